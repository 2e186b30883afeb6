import json
import subprocess

import pytest

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import DataError, OutputError
from ddp_sgd.plan import make_plan
from ddp_sgd.report.journal import read_journal
from ddp_sgd.report.reporter import git_commit, open_report

PLAN = make_plan(RunConfig(), samples=100, world_size=1)


def config(folder, **changes):
    return RunConfig(output_dir=str(folder), name="x", wandb={"mode": "disabled"}, **changes)


def result(folder):
    return json.loads((folder / "x" / "result.json").read_text())


def test_rows_have_their_place_in_the_run(tmp_path):
    with open_report(config(tmp_path), Runtime()) as report:
        report.start(PLAN)
        report.train(2, {"train/loss": float("nan")})
        report.train(3, None)
        report.eval(4, {"eval/loss": 0.5})
        report.eval(4, {})
        report.stop(5, None)
        report.end({"status": "stopped", "step": 5, "samples": 132})
    rows = read_journal(tmp_path / "x" / "metrics.jsonl")
    assert [(r["event"], r["step"], r["epoch"], r["samples"]) for r in rows] == [
        ("start", 0, 0.0, 0),
        ("train", 2, 0.64, 64),
        ("eval", 4, 1.0, 100),
        ("stop", 5, 1.32, 132),
        ("end", 5, 1.32, 132),
    ]
    assert rows[1]["train/loss"] is None
    assert rows[3]["reason"] == "another rank was asked to stop"
    assert result(tmp_path).keys() == {"status", "step", "samples", "wall_s"}


def test_only_rank_0_writes(tmp_path, capsys):
    with open_report(config(tmp_path), Runtime(rank=1, world_size=2)) as report:
        report.start(PLAN)
        report.train(2, {"train/loss": 1.0})
        report.end({"status": "finished", "step": 2})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_failure_before_the_plan_is_recorded(tmp_path):
    with pytest.raises(DataError), open_report(config(tmp_path), Runtime()):
        raise DataError("x is empty; fill it.")
    assert {path.name for path in (tmp_path / "x").iterdir()} == {"result.json"}
    written = result(tmp_path)
    assert written.pop("wall_s") >= 0
    assert written == {
        "status": "failed",
        "exit_code": 65,
        "step": 0,
        "epoch": 0.0,
        "samples": 0,
        "world_size": 1,
        "error": "x is empty; fill it.",
    }


def test_a_failure_in_the_middle_is_recorded_with_its_place(tmp_path):
    with pytest.raises(KeyError), open_report(config(tmp_path), Runtime()) as report:
        report.start(PLAN)
        report.train(2, {"train/loss": 1.0, "train/lr": 0.1, "train/skipped_steps": 0,
                         "throughput/samples_per_s": 1.0})  # fmt: skip
        raise KeyError("y")
    assert (
        result(tmp_path)["status"],
        result(tmp_path)["exit_code"],
        result(tmp_path)["step"],
    ) == ("failed", 70, 2)
    assert read_journal(tmp_path / "x" / "metrics.jsonl")[-1]["status"] == "failed"


def test_a_folder_that_goes_away_does_not_hide_the_error(tmp_path):
    with pytest.raises(DataError), open_report(config(tmp_path), Runtime()) as report:
        report.start(PLAN)
        (tmp_path / "x").rename(tmp_path / "elsewhere")
        raise DataError("the true one.")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), open_report(config(tmp_path / "file"), Runtime()):
        raise AssertionError("must not get here")


def test_a_row_needs_a_plan(tmp_path):
    with (
        pytest.raises(RuntimeError, match="before the run had a plan"),
        open_report(config(tmp_path), Runtime()) as report,
    ):
        report.train(1, {"train/loss": 1.0})


def test_git_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], check=True)
    (tmp_path / "f").write_text("1")
    subprocess.run(["git", "add", "f"], check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "x"], check=True)
    clean = git_commit()
    assert len(clean) == 40
    (tmp_path / "f").write_text("2")
    assert git_commit() == clean + "+changes"
    monkeypatch.setenv("PATH", "")
    assert git_commit() is None
