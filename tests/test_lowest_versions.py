import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from limits import WAIT_S
from lowest_versions import lowest_versions
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "lowest_versions.py"
PROJECT = {"name": "ours", "requires-python": ">=3.11", "dependencies": ["torch>=2.10", "a_b>=1.2"]}


def _project(**extras):
    return PROJECT | {"optional-dependencies": {"test": []} | extras}


def _run(*options):
    return subprocess.run(
        [sys.executable, SCRIPT, *options],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


def test_every_requirement_has_a_lowest_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest = lowest_versions(project)
    assert {"numpy", "pyyaml", "pydantic", "wandb", "tqdm", "timm", "pytest"} <= set(lowest)
    assert not {"torch", "torchvision"} & set(lowest)
    assert lowest["pydantic"] == Version("2.9")


def test_extras_that_an_extra_names_count_and_the_higher_promise_holds():
    project = _project(test=["Ours[more]", "c>=3,<4"], more=["A.B[x]>=1.10"])
    assert lowest_versions(project) == {"a-b": Version("1.10"), "c": Version("3")}


def test_a_requirement_without_one_is_refused():
    with pytest.raises(SystemExit, match="^c of pyproject.toml has no lowest version; write c>="):
        lowest_versions(_project(test=["c<4"]))


def test_pip_can_read_them():
    done = _run()
    assert (done.returncode, done.stderr) == (0, "")
    assert "pydantic==2.9\n" in done.stdout
    assert all(line.count("==") == 1 for line in done.stdout.splitlines())


def test_other_versions_are_named():
    """This test runs with the pinned versions; `make lowest` has the others."""
    done = _run("--check")
    assert done.returncode == 1
    assert "pydantic is 2." in done.stdout
    assert "; install pydantic==2.9.\n" in done.stdout
