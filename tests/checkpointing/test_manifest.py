import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from saving import flip, header, scored

from ddp_sgd import files
from ddp_sgd.checkpointing.store import Manifest, read_manifest

MANIFEST = Manifest(
    file="step-00000001.pt",
    size_bytes=4096,
    sha256="ab" * 32,
    time=1763767567.1234567,  # several last digits stand for the same number
    header=scored(1, 0.1),
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "step-00000001.json"
    path.write_text(MANIFEST.to_text())
    return path


def test_what_is_written_is_read(path):
    assert read_manifest(path) == MANIFEST


def test_no_flipped_bit_passes(path):
    """Each of them: also the last digit of a float, the case of an exponent, of an escape."""
    missed = []
    for bit in range(8 * path.stat().st_size):
        flip(path, bit)
        if read_manifest(path) is not None:
            missed.append((bit, path.read_bytes()[bit // 8 - 9 : bit // 8 + 9]))
        flip(path, bit)
    assert missed == []


def test_no_torn_one_passes(path):
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        assert read_manifest(path) is None
    path.write_bytes(good * 2)
    assert read_manifest(path) is None


def changed(**changes):
    return json.dumps(json.loads(MANIFEST.to_text()) | changes, indent=1) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        changed(format=2),
        changed(format=True),
        changed(header=None),
        changed(header=[]),
        changed(check=""),
        changed(step=1),
        changed(size_bytes=4097),
        "null",
        "[]",
        "{}",
        '"text"',
        "[" * 100_000,
        "\xff",
    ],
)
def test_what_is_no_manifest_of_this_format_is_none(text, path):
    path.write_text(text, encoding="latin-1")
    assert read_manifest(path) is None


def test_a_missing_one_or_a_folder_is_none(tmp_path):
    assert read_manifest(tmp_path / "step-00000001.json") is None
    assert read_manifest(tmp_path) is None


def test_one_that_cannot_be_read_is_not_missing(path, monkeypatch):
    def fail(*args, **options):
        raise OSError(errno.ESTALE, "told by the test")

    monkeypatch.setattr(files, "sleep", lambda pause: None)
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(OSError, match="told by the test"):
        read_manifest(path)


def test_only_scores_of_the_weights_that_are_saved_count():
    assert scored(7, 0.5).is_scored
    assert not replace(scored(7, 0.5), step=8).is_scored
    assert not header(0).is_scored  # nothing was evaluated at step 0


def test_reading_needs_no_torch():
    code = "import sys, ddp_sgd.checkpointing.store; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
