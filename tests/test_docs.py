"""The documents hold: commands run, the output shown is real, links lead somewhere.

A page is read from top to bottom in a scratch folder that looks like the repository:

* ``bash``: the block runs, and no command in it fails.
* ``console``: the lines after ``$`` run, and what is shown below each is what it prints, ``...``
  standing for anything. A command may fail only where an error of ours is shown.
* ``python``: blocks that follow each other run as one program.
* ``yaml``: the block is a valid configuration.
* A block of python or yaml whose first line is ``# NAME.py`` or ``# NAME.yaml`` is saved under that
  name instead, for the blocks below it.
* ``text`` and ``json`` are for reading.

Three kinds of commands do not run as they stand. ``pip install`` is left out. ``srun`` is a
dummy that starts real ranks here, with the variables that SLURM sets. ``make`` says what it
would do, since tests run inside ``make test``; but ``make train`` runs, unless it would install
something first.
"""

import doctest
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from commands import python_folder
from limits import WAIT_S

from ddp_sgd.config import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
KNOWN = {"bash", "console", "python", "yaml", "text", "json"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")

SRUN = """#!/usr/bin/env bash
export SLURM_NTASKS=1 SLURM_JOB_ID=%d SLURM_JOB_NODELIST=localhost
while [[ $1 == -* ]]; do
    case $1 in
        --ntasks=*) SLURM_NTASKS=${1#*=} ;;
        --nodes=1) ;;
        *) echo "the dummy for srun does not know $1" >&2; exit 64 ;;
    esac
    shift
done
tasks=() code=0
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit "$code"
"""

MAKE = """#!/usr/bin/env bash
%(make)s --question .venv/.installed 2>/dev/null && [[ $* == train ]] && exec %(make)s train
exec %(make)s --dry-run "$@"
"""

PIP = """#!/usr/bin/env bash
[[ $1 == install ]]
"""

OURS = ("COV", "DDP_SGD_", "WANDB_", "SLURM_", "MAKE", "MFLAGS", "ARGS", "PROCESSES", "PYTHON")
"""Variables that would change what a page says, or how long it takes; those of make come from
``make test`` around us."""

pytestmark = pytest.mark.timeout(600)


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks_of(page):
    text = page.read_text()
    return [
        Block(match[1], match[2], text.count("\n", 0, match.start()) + 2)
        for match in FENCE.finditer(text)
    ]


def ids(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


@pytest.fixture
def reader(tmp_path):
    return Reader(tmp_path)


class Reader:
    """Somebody who follows a page, in a shell and an editor of their own."""

    def __init__(self, tmp_path):
        self.folder = tmp_path / "repository"
        self.folder.mkdir()
        for name in (
            ".venv",
            "Makefile",
            "configs",
            "constraints.txt",
            "examples",
            "launch",
            "pyproject.toml",
            "tests",
        ):
            if (ROOT / name).exists():
                (self.folder / name).symlink_to(ROOT / name)
        tools = tmp_path / "bin"
        tools.mkdir()
        make = shutil.which("make") or "make"
        for name, text in (
            ("make", MAKE % {"make": make}),
            ("pip", PIP),
            ("srun", SRUN % free_job_id()),
        ):
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        inherited = {key: text for key, text in os.environ.items() if not key.startswith(OURS)}
        self.environment = inherited | {
            "PATH": f"{tools}:{python_folder()}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "disabled",
        }

    def run(self, *command):
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=WAIT_S,
            check=False,
        )

    def save(self, block):
        (self.folder / NAMED.match(block.text)[1]).write_text(block.text)

    def shell(self, block, page):
        done = self.run("bash", "-euo", "pipefail", "-c", block.text)
        assert done.returncode == 0, f"{page}:{block.line}\n{done.stdout}"

    def console(self, block, page):
        for command, shown in commands_of(block.text):
            done = self.run("bash", "-c", command)
            assert done.returncode == 0 or "ddp_sgd: error:" in shown, (
                f"{page}:{block.line} {command}\n{done.stdout}"
            )
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            matches = doctest.OutputChecker().check_output(shown, done.stdout, flags)
            assert matches, f"{page}:{block.line} {command}\n{done.stdout}"

    def python(self, blocks, page):
        program = ""
        for block in blocks:  # each at its line of the page, so that a traceback leads there
            program += "\n" * (block.line - 1 - program.count("\n")) + block.text
        path = self.folder / f"{page.stem}_md.py"
        path.write_text(program)
        done = self.run("python", str(path))
        assert done.returncode == 0, f"{page}\n{done.stdout}"

    def yaml(self, block, page):
        path = self.folder / "block.yaml"
        path.write_text(block.text)
        load_config([f"--config={path}"], environ={})


def commands_of(text):
    """Commands of a console block, each with the output shown below it."""
    text = re.sub(r"\\\n(?:> ?)?", "", text)
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    assert parts[0] == ""
    return list(zip(parts[1::2], parts[2::2], strict=True))


def free_job_id():
    """A job number from which a free port follows."""
    for port in range(10_000, 30_000):
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port - 10_000
    raise AssertionError("no port is free")


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_a_page_does_what_it_says(page, reader):
    session = []
    for block in blocks_of(page):
        assert block.language in KNOWN, f"{page}:{block.line} has a block without a known language"
        if block.language in ("python", "yaml") and NAMED.match(block.text):
            reader.save(block)
        elif block.language == "python":
            session.append(block)
        elif block.language in ("bash", "console", "yaml"):
            if session:
                reader.python(session, page)
                session = []
            {"bash": reader.shell, "console": reader.console, "yaml": reader.yaml}[block.language](
                block, page
            )
    if session:
        reader.python(session, page)


@pytest.mark.parametrize("page", PAGES, ids=ids(PAGES))
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"", text):
        path, _, anchor = "".join(target).partition("#")
        if path.startswith(("http://", "https://")):
            continue
        file = page.parent / path if path else page
        assert file.exists(), f"{page} links to {path}"
        assert not anchor or anchor in anchors_of(file), f"{page} links to {path}#{anchor}"


def anchors_of(page):
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_document_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in ROOT.glob("docs/*.md") if f"docs/{page.name}" not in readme] == []


def test_console_blocks_are_taken_apart():
    text = textwrap.dedent("""\
        $ one \\
        >   two
        shown
        $ three
        """)
    assert commands_of(text) == [("one   two", "shown\n"), ("three", "")]


def test_a_page_that_is_wrong_is_found(reader, tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(AssertionError):
        reader.shell(Block("bash", "false\ntrue\n", 1), page)
    with pytest.raises(AssertionError):
        reader.console(Block("console", "$ echo one\ntwo\n", 1), page)
    with pytest.raises(AssertionError):
        reader.console(Block("console", "$ exit 3\n", 1), page)
    with pytest.raises(AssertionError):
        reader.python([Block("python", "1 / 0\n", 1)], page)
