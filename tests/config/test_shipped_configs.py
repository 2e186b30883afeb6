from pathlib import Path

import pytest

from ddp_sgd.config import load_config

FOLDER = Path(__file__).parents[2] / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_configurations():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_it_resolves(file):
    load_config([f"--config={file}"], environ={})


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
@pytest.mark.parametrize("word", ["command:", "expected:", "hardware:", "source:"])
def test_its_header_says_how_it_was_run(file, word):
    lines = file.read_text(encoding="utf-8").splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    header = [line.removeprefix("#").strip() for line in lines[:end]]
    assert [line for line in header if line.startswith(word) and line != word]
