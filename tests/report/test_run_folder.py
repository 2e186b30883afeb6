import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from ddp_sgd.config import RunConfig
from ddp_sgd.errors import ExitCode, OutputError, RefusedError
from ddp_sgd.plan import make_plan
from ddp_sgd.report.run_folder import RunFolder, open_run_folder
from ddp_sgd.report.sink import RunRecord


def test_an_old_run_is_moved_aside_and_nothing_is_overwritten(tmp_path):
    for number in range(4):
        folder = open_run_folder(str(tmp_path / "runs"), "x")
        assert list(folder.iterdir()) == []
        (folder / "number").write_text(str(number))
    kept = {path.name: (path / "number").read_text() for path in (tmp_path / "runs").iterdir()}
    assert kept == {"x.1": "0", "x.2": "1", "x.3": "2", "x": "3"}


def test_a_file_or_a_dangling_link_in_the_way_is_moved_aside(tmp_path):
    (tmp_path / "x").write_text("precious")
    open_run_folder(str(tmp_path), "x")
    assert (tmp_path / "x.1").read_text() == "precious"
    (tmp_path / "y").symlink_to(tmp_path / "nowhere")
    assert open_run_folder(str(tmp_path), "y").is_dir()
    assert not (tmp_path / "nowhere").exists()


def test_a_link_to_an_old_run_is_not_followed(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "x").symlink_to(elsewhere)
    (open_run_folder(str(tmp_path), "x") / "new").touch()
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("output_dir", ["/proc/nowhere", "{tmp}/file"])
def test_what_cannot_be_written_is_named(output_dir, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        OutputError, match=r"/x cannot be written: .*; set output_dir to a folder"
    ) as caught:
        open_run_folder(output_dir.format(tmp=tmp_path), "x")
    assert caught.value.exit_code == ExitCode.OUTPUT


def record(folder):
    plan = make_plan(RunConfig(), samples=10, world_size=1)
    return RunRecord(
        folder=folder,
        name="x",
        config={},
        plan=plan,
        world_size=1,
        git_commit=None,
        run_id="0a1b2c3d",
        resumed=False,
    )


def test_plan_and_result_are_strict_json(tmp_path):
    verdict = RunFolder(tmp_path, "name: x\n")
    verdict.start(record(tmp_path))
    verdict.write("train", {})
    verdict.finish({"status": "finished", "eval/loss": None})
    assert (tmp_path / "config.yaml").read_text() == "name: x\n"
    assert json.loads((tmp_path / "plan.json").read_text()) == asdict(record(tmp_path).plan)
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "status": "finished",
        "eval/loss": None,
    }
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "plan.json", "result.json"}
    with pytest.raises(ValueError, match="Out of range"):
        verdict.finish({"eval/loss": float("nan")})


def test_a_folder_that_went_away(tmp_path):
    with pytest.raises(OutputError, match=r"result.json cannot be written: No such file"):
        RunFolder(tmp_path / "gone", "").finish({})
    assert not Path(tmp_path / "gone").exists()


def test_the_folder_of_a_run_that_is_going_on_is_left_alone(tmp_path):
    first = RunFolder(open_run_folder(str(tmp_path), "x"), "")
    with pytest.raises(RefusedError, match="x is in use by a run that is going on; wait") as caught:
        open_run_folder(str(tmp_path), "x")
    assert caught.value.exit_code == ExitCode.REFUSED
    first.finish({})
    open_run_folder(str(tmp_path), "x")
    assert (tmp_path / "x.1" / "result.json").exists()


def test_a_run_that_was_killed_gives_its_folder_free(tmp_path):
    code = (
        "import os, sys; from ddp_sgd.report.run_folder import *; "
        "held = RunFolder(open_run_folder(sys.argv[1], 'x'), ''); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    open_run_folder(str(tmp_path), "x")
    assert (tmp_path / "x.1").is_dir()
