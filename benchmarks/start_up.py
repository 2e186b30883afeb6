"""How long commands take to answer, and to their first step, as whole processes.

Usage: ``python -m benchmarks.start_up [--rounds 7]``.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import harness

TRAIN = ("-m", "ddp_sgd.train", "--epochs=1", "--resume=never")
COMMANDS = {
    "import ddp_sgd": ("-c", "import ddp_sgd"),
    "a wrong key is answered": ("-m", "ddp_sgd.train", "--optim.lrr=1"),
    "explain, 64 ranks": ("-m", "ddp_sgd.explain", "--world_size=64"),
    "import torch": ("-c", "import torch"),
    "train one epoch of the digits, W&B off": (*TRAIN, "--wandb.mode=disabled"),
    "train one epoch of the digits, W&B offline": (*TRAIN, "--wandb.mode=offline"),
}
"""Timed from their start to their end."""

JOIN = """
import os, pathlib, time
import torch
import torch.distributed as dist
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    dist.init_process_group("gloo")
    dist.barrier()
if os.environ.get("RANK", "0") == "0":
    pathlib.Path(os.environ["JOINED"]).write_text(str(time.time()))
"""
MOMENTS = {
    "import torch": (1, "join"),
    "first step of ddp_sgd": (1, "step"),
    "torchrun, 2 ranks: import torch, join by gloo": (2, "join"),
    "torchrun, 2 ranks: first step of ddp_sgd": (2, "step"),
}
"""Timed from their start to a moment: all have joined, or the first step is done."""


def measure(options: Namespace) -> Iterator[str]:
    """Run everything in turn."""
    with tempfile.TemporaryDirectory(prefix="start_up-") as name:
        folder = Path(name)
        (folder / "join.py").write_text(JOIN)
        cases = {("end", case): partial(whole_s, words, folder) for case, words in COMMANDS.items()}
        cases |= {
            ("the moment", case): partial(until_s, ranks, moment, folder)
            for case, (ranks, moment) in MOMENTS.items()
        }
        found = harness.alternate(cases, options.rounds)
    for end in ("end", "the moment"):
        yield harness.markdown_table(
            f"from start to {end} | s",
            ((case, values) for (which, case), values in found.items() if which == end),
        )


def whole_s(words: tuple[str, ...], folder: Path) -> float:
    """Return the wall time of one process, which may fail."""
    words = (*words, f"--output_dir={folder}") if words[:2] == TRAIN[:2] else words
    start = time.perf_counter()
    harness.run_python(*words, may_fail=True)
    return time.perf_counter() - start


def until_s(ranks: int, moment: str, folder: Path) -> float:
    """Return the time from the start of a process to its moment."""
    step = (*TRAIN, f"--output_dir={folder}", "--name=step", "--log.every_steps=1")
    words = (*step, "--wandb.mode=offline") if moment == "step" else (str(folder / "join.py"),)
    start = time.time()
    harness.run_python(*words, ranks=ranks, JOINED=str(folder / "joined"))
    if moment == "join":
        return float((folder / "joined").read_text()) - start
    return float(harness.journal_rows(folder / "step")[0]["time"]) - start


if __name__ == "__main__":
    harness.run_benchmark("start_up", harness.option_parser(__doc__, rounds=7), measure)
