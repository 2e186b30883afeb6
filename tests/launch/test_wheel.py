"""The launcher as pip installs it: from a wheel, where there is no source tree."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from launching import ROOT, environment
from limits import WAIT_S


def call(*command, cwd, **variables):
    """Run a command of the wheel's environment; return what it prints."""
    ours = {name: value for name, value in environment().items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=ours | variables,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def python(tmp_path):
    """An interpreter that has the wheel, and all that is installed for this one but ddp_sgd."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input")
    offline = ("--quiet", "--no-index", "--no-deps")
    place = tmp_path / "wheel"
    call(*pip, "wheel", *offline, "--no-build-isolation", "-w", place, ROOT, cwd=tmp_path)
    (wheel,) = place.glob("ddp_sgd-*.whl")
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    call(*pip, "--python", python, "install", *offline, wheel, cwd=tmp_path)
    (home,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # Folders that a .pth file names are searched last, and their own .pth files are not read: so
    # this interpreter's editable ddp_sgd is out of sight.
    others = [path for path in sys.path if Path(path).name == "site-packages"]
    (home / "behind.pth").write_text("".join(f"{path}\n" for path in others))
    return python


def test_the_wheel_trains_in_an_empty_folder(python, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    found = call(python, "-c", "import ddp_sgd; print(ddp_sgd.__file__)", cwd=folder)
    assert Path(found).is_relative_to(tmp_path / "env")
    options = ("--nproc", "2", "--", "--epochs=2", "--wandb.mode=disabled")
    said = call(python, "-m", "ddp_sgd.launch", *options, cwd=folder)
    assert "finished: 46 steps" in said
    assert [path.name for path in folder.iterdir()] == ["runs"]
    result = json.loads((folder / "runs" / "digits" / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["world_size"]) == ("finished", 0, 2)
