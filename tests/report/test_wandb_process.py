"""The process in which W&B runs, seen from its pipe; what it logs is in test_weights_and_biases."""

import os
import pickle
import subprocess
import sys

import pytest
from limits import WAIT_S

from ddp_sgd.report import wandb_process as module
from ddp_sgd.report.wandb_process import _numbers, _read, _reason

START = [sys.executable, "-c", "from ddp_sgd.report.wandb_process import main; main()"]


def test_it_leaves_with_the_rank():
    process = subprocess.Popen(START, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.close()
    assert process.stdout.read() == b""
    assert process.wait(WAIT_S) == 1
    process.stdout.close()


def test_it_imports_neither_torch_nor_wandb_before_it_is_told_to():
    code = (
        "import sys, ddp_sgd.report.wandb_process; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'wandb', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_messages_come_in_order_and_the_end_of_the_pipe_ends_the_process(monkeypatch):
    class LeftError(BaseException):
        pass

    def leave(code):
        raise LeftError(code)

    monkeypatch.setattr(module.os, "_exit", leave)
    reading, writing = os.pipe()
    for number in range(3):
        os.write(writing, pickle.dumps(("train", {"step": number})))
    os.close(writing)
    with os.fdopen(reading, "rb") as messages:
        rows = _read(messages)
        assert [next(rows)[1]["step"] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(LeftError):
            next(rows)


def test_numbers_of_a_row_with_its_own_time():
    row = {"time": 5.0, "step": 3, "train/loss": 0.5, "note": "text", "train/lr": None}
    assert _numbers(row) == {"_timestamp": 5.0, "step": 3, "train/loss": 0.5}
    assert row["time"] == 5.0


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("a\nb"), "a"), (KeyError(), "KeyError"), (OSError(""), "OSError")],
)
def test_the_reason_is_one_line(error, line):
    assert _reason(error) == line
