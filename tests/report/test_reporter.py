import json
import os
import threading
from contextlib import contextmanager

import pytest

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.train_state import State
from ddp_sgd.errors import DataError, OutputError
from ddp_sgd.plan import make_plan
from ddp_sgd.report.journal import Origin, read_journal
from ddp_sgd.report.reporter import Reporter, open_report
from ddp_sgd.report.run_folder import RunFolder, claim_run_folder

ORIGIN = Origin(run_id="0123cafe")
PLAN = make_plan(RunConfig(), samples=100, world_size=1)


def config(folder, **changes):
    return RunConfig(output_dir=str(folder), name="x", wandb={"mode": "disabled"}, **changes)


@contextmanager
def reporting(folder, state=None, runtime=None, origin=ORIGIN, **changes):
    runtime, settings = runtime or Runtime(), config(folder, **changes)
    with claim_run_folder(settings, runtime) as claimed:
        with open_report(settings, runtime, claimed, origin) as report:
            yield report


def result(folder):
    return json.loads((folder / "x" / "result.json").read_text())


def test_rows_have_their_place_in_the_run(tmp_path):
    state = State()
    with reporting(tmp_path) as report:
        report.start(PLAN, state)
        state.step = 2
        report.train({"train/loss": float("nan")})
        state.step = 3
        report.train(None)
        state.step = 4
        report.eval({"eval/loss": 0.5})
        report.eval({})
        report.checkpoint(2, {"file": "step-00000002.pt"})
        state.step = 5
        report.stop(None)
        report.end({"status": "stopped", "step": 5, "samples": 132})
    rows = read_journal(tmp_path / "x" / "metrics.jsonl")
    assert [(r["event"], r["step"], r["epoch"], r["samples"]) for r in rows] == [
        ("start", 0, 0.0, 0),
        ("train", 2, 0.64, 64),
        ("eval", 4, 1.0, 100),
        ("checkpoint", 2, 0.64, 64),
        ("stop", 5, 1.32, 132),
        ("end", 5, 1.32, 132),
    ]
    assert rows[1]["train/loss"] is None
    assert rows[4]["reason"] == "another rank was asked to stop"
    assert result(tmp_path).keys() == {"status", "step", "samples", "wall_s"}


def test_only_rank_0_writes(tmp_path, capsys):
    with reporting(tmp_path, runtime=Runtime(rank=1, world_size=2)) as report:
        report.start(PLAN, State())
        report.train({"train/loss": 1.0})
        report.end({"status": "finished", "step": 2})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_failure_before_the_plan_is_recorded(tmp_path):
    with pytest.raises(DataError), reporting(tmp_path):
        raise DataError("x is empty; fill it.")
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        ".lock", "result.json", "failures.jsonl",
    }  # fmt: skip
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
    state = State(step=2)
    with pytest.raises(KeyError), reporting(tmp_path) as report:
        report.start(PLAN, state)
        report.train({"train/loss": 1.0, "train/lr": 0.1, "train/skipped_steps": 0,
                         "throughput/samples_per_s": 1.0})  # fmt: skip
        state.step = 3  # the failure is later than the last row
        raise KeyError("y")
    assert (
        result(tmp_path)["status"],
        result(tmp_path)["exit_code"],
        result(tmp_path)["step"],
    ) == ("failed", 70, 3)
    assert read_journal(tmp_path / "x" / "metrics.jsonl")[-1]["status"] == "failed"


def test_a_folder_that_goes_away_does_not_hide_the_error(tmp_path):
    with pytest.raises(DataError), reporting(tmp_path) as report:
        report.start(PLAN, State())
        (tmp_path / "x").rename(tmp_path / "elsewhere")
        raise DataError("the true one.")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError), reporting(tmp_path / "file"):
        raise AssertionError("must not get here")


def test_a_row_needs_a_plan(tmp_path):
    with (
        pytest.raises(RuntimeError, match="before the run had a plan"),
        reporting(tmp_path) as report,
    ):
        report.train({"train/loss": 1.0})


def test_a_failure_before_the_plan_of_a_run_that_goes_on(tmp_path):
    origin = Origin(run_id="cafe0123", has_rows=True, step=3, epoch=0.96, samples=96)
    with pytest.raises(DataError), reporting(tmp_path, origin=origin):
        raise DataError("x is empty; fill it.")
    assert {key: result(tmp_path)[key] for key in ("step", "epoch", "samples")} == {
        "step": 3, "epoch": 0.96, "samples": 96,
    }  # fmt: skip


def test_a_run_that_goes_on_says_from_where(tmp_path, capsys):
    state = State()
    with reporting(tmp_path) as report:
        report.start(PLAN, state)
        for state.step in (1, 2, 3):
            report.train({"train/loss": 1.0, "train/lr": 0.1, "train/skipped_steps": 0,
                          "throughput/samples_per_s": 1.0})  # fmt: skip
        report.stop("the test")
        report.end({"status": "stopped", "step": 3, "samples": 96, "exit_code": 75})
    note = {"file": "step-00000002.pt", "passed_over": "step-00000003.pt is damaged"}
    origin = Origin(
        run_id="cafe0123", has_rows=True, is_resumed=True, step=2, samples=64, note=note
    )
    capsys.readouterr()
    with reporting(tmp_path, origin=origin) as report:
        report.start(PLAN, State(step=2))
        assert not (tmp_path / "x" / "result.json").exists()
        report.end({"status": "stopped", "step": 2, "samples": 64, "exit_code": 75})
    rows = read_journal(tmp_path / "x" / "metrics.jsonl")
    assert [(row["event"], row["step"]) for row in rows] == [
        ("start", 0), ("train", 1), ("train", 2), ("resume", 2), ("end", 2),
    ]  # fmt: skip
    assert rows[0]["run_id"] == "0123cafe"
    lines = capsys.readouterr().out.splitlines()
    assert "passed over: step-00000003.pt is damaged" in lines
    assert "going on from step 2, epoch 0.64 (step-00000002.pt)" in lines


def test_training_does_not_wait_for_a_row_and_a_flush_does(tmp_path):
    with reporting(tmp_path) as report:
        report.start(PLAN, State(step=1))
        report.flush()
        written = (tmp_path / "x" / "metrics.jsonl").stat().st_size
        report.train({"train/loss": 1.0})
        report.flush()
        assert (tmp_path / "x" / "metrics.jsonl").stat().st_size > written
        report.end({"status": "finished", "step": 1, "samples": 1})


def test_a_fork_writes_nothing(tmp_path):
    with reporting(tmp_path) as report:
        report.start(PLAN, State(step=1))
        report.flush()
        child = os.fork()
        if not child:
            report.train({"train/loss": 2.0})
            report.flush()
            report.fail(ValueError("in a fork"))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        report.train({"train/loss": 1.0})
        report.end({"status": "finished", "step": 1, "samples": 1})
    rows = read_journal(tmp_path / "x" / "metrics.jsonl")
    assert [row.get("train/loss") for row in rows] == [None, 1.0, None]
    assert result(tmp_path)["status"] == "finished"


def test_rows_can_be_written_from_another_thread_and_a_fault_is_the_training_threads(tmp_path):
    with pytest.raises(OutputError), reporting(tmp_path) as report:
        report.start(PLAN, State(step=1))
        path = tmp_path / "x" / "metrics.jsonl"
        assert [row["event"] for row in read_journal(path)] == ["start"]  # before any step
        report.train({"train/loss": 1.0})
        writer = threading.Thread(target=report.catch_up)
        writer.start()
        writer.join()
        assert [row["event"] for row in read_journal(path)] == ["start", "train"]
        report._opened[-1].write = fail
        report.train({"train/loss": 2.0})
        report.catch_up()
        report.train({"train/loss": 3.0})


def fail(rows):
    raise OutputError("full")


class Recorder:
    """A logger that keeps its calls in a list; it may fail to open."""

    def __init__(self, name, calls, error=None):
        self._name, self._calls, self._error = name, calls, error

    def start(self, record):
        if self._error:
            raise self._error
        self._calls.append((self._name, "start"))

    def write(self, rows):
        self._calls.extend((self._name, event) for event, _ in rows)

    def finish(self, result):
        self._calls.append((self._name, result["status"]))


def reporter(folder, *loggers):
    settings = config(folder)
    return Reporter(RunFolder(settings), loggers, settings, 1, ORIGIN)


def test_several_loggers_get_everything_in_order_and_close_backwards(tmp_path):
    calls = []
    report = reporter(tmp_path, Recorder("first", calls), Recorder("second", calls))
    report.start(PLAN, State())
    report.train({"train/loss": 1.0})
    report.eval({"eval/loss": 1.0})
    report.end({"status": "finished"})
    first = [event for name, event in calls if name == "first"]
    assert first == ["start", "start", "train", "eval", "end", "finished"]
    assert [event for name, event in calls if name == "second"] == first
    assert [name for name, event in calls if event == "train"] == ["first", "second"]
    assert calls[-2:] == [("second", "finished"), ("first", "finished")]


def test_loggers_that_were_never_opened_get_nothing(tmp_path):
    calls, shut = [], OutputError("shut.")
    loggers = [Recorder("first", calls), Recorder("second", calls, shut), Recorder("third", calls)]
    report = reporter(tmp_path, *loggers)
    with pytest.raises(OutputError, match="shut"):
        report.start(PLAN, State())
    report.fail(shut)
    assert calls == [("first", "start"), ("first", "end"), ("first", "failed")]
    assert result(tmp_path)["error"] == "shut."
