import errno
import io
import os
import pty
import re
import subprocess
import sys
import termios
from dataclasses import replace

import pytest
from limits import WAIT_S

from ddp_sgd.config import RunConfig
from ddp_sgd.plan import make_plan
from ddp_sgd.report import progress as module
from ddp_sgd.report.journal import Origin, RunRecord, read_journal
from ddp_sgd.report.progress import Progress


@pytest.fixture
def record(tmp_path):
    config = RunConfig(epochs=2, schedule={"name": "step", "milestones": [1, 30]})
    plan = make_plan(config, samples=64, world_size=1)
    return RunRecord(
        folder=tmp_path,
        config=config,
        plan=plan,
        origin=Origin(run_id="0a1b2c3d"),
    )


def train_row(step, loss, **changes):
    return {
        "step": step,
        "epoch": step / 2,
        "samples": 32 * step,
        "train/loss": loss,
        "train/lr": 0.1,
        "train/skipped_steps": 0,
        "throughput/samples_per_s": 1234.5,
    } | changes


END = {"status": "finished", "step": 4, "samples": 128, "wall_s": 2.0, "eval/loss": 0.25,
       "eval/accuracy": 0.5, "eval/correct": 5, "eval/count": 10}  # fmt: skip


def test_numbers_that_a_loss_names_stand_beside_it(record, capsys):
    progress = Progress()
    progress.start(record)
    for step, box in enumerate([1.0, 2.0, None, 5.0], start=1):
        named = {"train/box": box, "train/none": None, "train/accuracy": 0.5}
        progress.write([("train", train_row(step, 4.0, **named))])
    progress.write([("eval", {"eval/loss": 0.25, "eval/box": 0.125, "eval/count": 10})])
    progress.finish({**END, "eval/box": 0.125})
    out = capsys.readouterr().out
    assert "step       2  loss 4.0000  box 1.5000  accuracy 0.5000  lr 0.1" in out
    assert "step       4  loss 4.0000  box 5.0000  accuracy 0.5000  lr 0.1" in out
    assert "eval loss 0.2500  box 0.1250\n" in out
    assert "eval loss 0.2500  box 0.1250  accuracy 50.00 % (5/10), 64" in out


def test_numbers_that_a_loss_names_stand_beside_it_for_each_set(record, capsys):
    progress = Progress()
    progress.start(record)
    sets = {"eval/near/loss": 0.25, "eval/near/box": 0.125, "eval/near/count": 10}
    sets |= {"eval/far/loss": 0.5, "eval/far/box": 0.75, "eval/far/count": 10}
    progress.write([("eval", sets)])
    progress.write([("eval", {"test/step": 2, "test/loss": 1.0, "test/box": 2.0, "test/count": 3})])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "eval/near loss 0.2500  box 0.1250" in lines
    assert "eval/far loss 0.5000  box 0.7500" in lines
    assert "test loss 1.0000  box 2.0000" in lines


def test_plain_lines_where_nobody_watches(record, capsys):
    progress = Progress()
    progress.start(record)
    progress.write([("start", {"step": 0})])
    for step, loss in enumerate([4.0, 2.0, 1.0, None], start=1):
        progress.write([("train", train_row(step, loss))])
    progress.write([("eval", {"eval/loss": 0.25, "eval/count": 10})])
    progress.write([("stop", {"step": 4, "reason": "SIGTERM"})])
    progress.finish(END)
    out, err = capsys.readouterr()
    assert err == ""
    assert "\nnote      milestones [30] are not reached in 2 epochs\n" in out
    assert (
        "epoch      1/2  step       2  loss 3.0000  lr 0.1  1,234 samples/s" in out
    )  # mean of the epoch
    assert "epoch      2/2  step       4  loss 1.0000" in out
    assert out.count("epoch  ") == 2
    assert "eval loss 0.2500\n" in out
    assert "stopping after step 4: SIGTERM" in out
    assert out.endswith(
        "finished: 4 steps in 2.0 s, eval loss 0.2500  accuracy 50.00 % (5/10), 64 samples/s in "
        "all, "
        f"results in {record.folder}\n"
    )


def test_a_line_at_the_end_of_a_run_within_an_epoch(record, capsys):
    plan = make_plan(RunConfig(steps=3), samples=64, world_size=1)
    progress = Progress()
    progress.start(replace(record, plan=plan))
    for step in (1, 2, 3):
        progress.write([("train", train_row(step, 4.0 / step))])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.partition("  loss")[0] for line in lines] == [
        "epoch      1/1.5  step       2",
        "epoch    1.5/1.5  step       3",
    ]


def test_skipped_steps_and_a_lost_loss_are_said(record, capsys):
    progress = Progress()
    progress.start(record)
    progress.write([("train", train_row(2, None, **{"train/skipped_steps": 2.0}))])
    assert (
        "loss not finite  lr 0.1  1,234 samples/s  2 steps skipped, gradient not finite"
        in capsys.readouterr().out
    )


def test_a_long_epoch_is_not_silent(record, capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    progress = Progress()
    progress.start(record)
    progress.write([("train", train_row(1, 4.0))])
    now[0] += 31
    progress.write([("train", train_row(1, 4.0))])
    assert capsys.readouterr().out.count("epoch    0.5/2") == 1


ALONE = {"share/compute": 0.5, "share/data": 0.25, "share/waiting": 0.0, "share/bookkeeping": 0.25}
TWO = ALONE | {"share/waiting": 0.2, "slowest_rank": 1, "share/lag": 0.123}


@pytest.mark.parametrize(
    ("shares", "line"),
    [
        (ALONE, "time      compute 50 %, data 25 %, bookkeeping 25 %"),
        (
            TWO,
            "time      compute 50 %, data 25 %, waiting 20 %, bookkeeping 25 %; slowest is rank 1, "
            "for which the others wait 12 %",
        ),
        (dict.fromkeys(ALONE, 0.0), ""),
        ({}, ""),
    ],
)
def test_where_the_time_went(record, capsys, shares, line):
    progress = Progress()
    progress.start(record)
    capsys.readouterr()
    progress.finish({"status": "finished", "step": 4, "samples": 8, **shares})
    *before, _ = capsys.readouterr().out.splitlines()
    assert "".join(before) == line


@pytest.mark.parametrize("result", [{"status": "failed"}])
def test_a_failure_leaves_the_word_to_the_error(record, capsys, result):
    progress = Progress()
    progress.finish(result)
    progress.start(record)
    capsys.readouterr()
    progress.finish(result)
    assert capsys.readouterr() == ("", "")


def _train_on(terminal, folder, *options):
    """Start a run on a terminal, of which this process keeps the other side."""
    shared = ["--wandb.mode=disabled", f"--output_dir={folder}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ddp_sgd.train", *options, *shared],
        stdout=terminal,
        stderr=terminal,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    os.close(terminal)
    return process


def test_a_terminal_that_hangs_up_does_not_end_a_run(tmp_path):
    main, child = pty.openpty()
    process = _train_on(child, tmp_path, "--epochs=2", "--log.every_steps=1")
    seen = b""
    while b"results in" not in seen:
        seen += os.read(main, 65536)
    os.close(main)
    assert process.wait(WAIT_S) == 0
    rows = read_journal(tmp_path / "digits" / "metrics.jsonl")
    assert (rows[-1]["event"], rows[-1]["step"]) == ("end", 90)


class _Gone(io.StringIO):
    """A terminal, until it is gone."""

    is_gone = False

    def isatty(self):
        return True

    def write(self, text):
        if self.is_gone:
            raise OSError(errno.EIO, "Input/output error")
        return super().write(text)


def test_a_bar_goes_with_its_terminal_and_lines_stay(record, capsys, monkeypatch):
    terminal = _Gone()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress()
    progress.start(record)
    progress.write([("train", train_row(1, 4.0))])
    assert "/4 [" in terminal.getvalue()
    terminal.is_gone = True
    progress.write([("train", train_row(2, 4.0))])
    progress.finish(END)
    out = capsys.readouterr().out
    assert "epoch      1/2  step       2" in out
    assert "finished: 4 steps" in out


def test_a_bar_on_a_real_terminal(tmp_path):
    main, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 100))
    process = _train_on(child, tmp_path, "--epochs=20")
    seen = b""
    while True:
        try:
            chunk = os.read(main, 65536)
        except OSError:  # the other side is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(main)
    assert process.wait() == 0
    text = seen.decode()
    assert re.search(r"\d+%\|.*/900 \[.*step/s, loss \d\.\d+ lr ", text)
    assert "finished: 900 steps" in text
