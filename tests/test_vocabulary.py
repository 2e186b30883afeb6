"""The vocabulary: names are the terms of the field, those of PyTorch's documentation."""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ddp_sgd", "tests", "benchmarks", "examples")
CODE = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PROSE = [
    *CODE,
    *sorted(path for path in ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(
        path for folder in ("configs", "launch", "slurm") for path in (ROOT / folder).rglob("*.*")
    ),
]

IDENTIFIERS = {
    *("fate", "meeting", "attendance", "pulse", "verdict", "culprits", "absence", "companion"),
    *("scribe", "examination", "consultation", "desk", "visitor", "sameness", "velocities"),
    *("heartbeat", "look_back", "conclude", "try_out", "plain_faults", "told_by"),
}
"""Words of identifiers and file names, in any case."""

CLASSES = {"Replica", "Chunks", "Parts", "Past"}
"""Words of class names; as variables or keys they are ordinary words."""

PHRASES = re.compile(r"\b(anew|mend(s|ed|ing)?|wish(es)? to stop|stand-ins?)\b", re.IGNORECASE)
"""What PyTorch's documentation would say in other words: again, fix, stop request, dummy."""


def names_in(path):
    """Identifiers of a Python file, with their lines."""
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def is_foreign(name):
    """Whether an identifier or a file name has a word that is not in use."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    lower = "_".join(word.lower() for word in words)
    is_class = name.lstrip("_")[:1].isupper() and name != name.upper()
    return any(f"_{word}_" in f"_{lower}_" for word in IDENTIFIERS) or (
        is_class and bool(CLASSES & set(words))
    )


@pytest.mark.parametrize(
    "name", ["SharedFate", "_fate", "PULSE", "told_by", "test_a_meeting_of", "FlatReplica"]
)
def test_foreign_names_are_found(name):
    assert is_foreign(name)


@pytest.mark.parametrize(
    "name", ["replica", "parts", "PARTS", "concluded", "Describe", "chunk_size", "paste"]
)
def test_ordinary_words_are_names(name):
    assert not is_foreign(name)


def test_identifiers_are_terms_of_the_field():
    own = {"test_vocabulary.py"}
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in CODE
        if path.name not in own
        for line, name in names_in(path)
        if is_foreign(name)
    ]
    assert found == []


def test_file_names_are_terms_of_the_field():
    paths = [path.relative_to(ROOT) for path in (*CODE, *PROSE)]
    assert [path for path in paths if any(is_foreign(part) for part in path.parts)] == []


def test_prose_is_that_of_the_field():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in PROSE
        if path.name != "test_vocabulary.py"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if PHRASES.search(line)
    ]
    assert found == []
