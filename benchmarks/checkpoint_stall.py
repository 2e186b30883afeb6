"""Stall of training for a checkpoint, against a plain ``torch.save``.

Usage: ``python -m benchmarks.checkpoint_stall [--megabytes 100] [--rounds 15]``.

An MLP whose weights and momentum buffers have ``--megabytes`` in all, one sample per step. A run of
30 steps saves after 10 and after 20; the stall is that of the second save, for which memory is
there already. A save in the background ends when it is verified on the disk and has its manifest:
written, synced, read back, hashed twice.
"""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import torch

from benchmarks import harness
from ddp_sgd import start_runtime
from ddp_sgd.data.datasets import InMemory

WIDTH, STEPS, SAVE_EVERY = 1024, 30, 10
Times = dict[str, float]
"""Times in milliseconds by what was measured."""


def measure(options: Namespace) -> Iterator[str]:
    """Save in turn by ``ddp_sgd`` and by ``torch.save``."""
    torch.set_num_threads(1)
    layers = round(options.megabytes * 1e6 / 2 / 4 / WIDTH**2)
    cases = {"plain": partial(save_plainly, layers), "ddp_sgd": partial(train, layers)}
    rounds = harness.alternate(cases, options.rounds)
    found = {name: [each[name] for each in case] for case in rounds.values() for name in case[0]}
    plain_ms, *_ = map(median, found.values())
    yield harness.markdown_table(
        f"{options.megabytes:g} MB | ms, median (quartiles) | of plain",
        ((name, harness.quartiles(ms), median(ms) / plain_ms) for name, ms in found.items()),
    )


def save_plainly(layers: int) -> Times:
    """Save tensors of as many bytes by ``torch.save``."""
    tensors = [torch.randn(WIDTH, WIDTH) for _ in range(2 * layers)]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        save = partial(torch.save, tensors, Path(folder) / "plain.pt")
        return {"plain `torch.save`": 1e3 * harness.elapsed_s(save)}


def train(layers: int) -> Times:
    """Train once, and read the journal."""
    train_set = InMemory(torch.randn(STEPS, WIDTH), torch.zeros(STEPS, dtype=torch.int64))
    shape = {"inputs": WIDTH, "hidden": [WIDTH] * layers, "classes": 10}
    sections = {
        "model": {"class_path": "ddp_sgd.models.MLP", "init_args": shape},
        "data": {"batch_size": 1},
        "checkpoint": {"every_steps": SAVE_EVERY, "every_epochs": None},
        "log": {"every_steps": 1},
        "wandb": {"mode": "disabled"},
    }
    with tempfile.TemporaryDirectory(dir=".") as folder, start_runtime(device="cpu") as runtime:
        harness.fit_with(None, runtime, train_set, output_dir=folder, epochs=1, **sections)
        run = Path(folder) / "digits"
        steps, saves = (harness.journal_rows(run, event) for event in ("train", "checkpoint"))
    steps_ms = [row["time/step_ms"] for row in steps]
    (save,) = [row for row in saves if row["step"] == 2 * SAVE_EVERY]
    return {
        "stall of a save": 1e3 * save["stall_s"],
        "longest step while it is written": max(steps_ms[2 * SAVE_EVERY + 1 :]),
        "longest step with nothing written": max(steps_ms[2:SAVE_EVERY]),
        "a save in the background, to its end": 1e3 * save["save_s"],
    }


if __name__ == "__main__":
    parser = harness.option_parser(__doc__, rounds=15)
    parser.add_argument("--megabytes", type=float, default=100.0)
    harness.run_benchmark("checkpoint_stall", parser, measure)
