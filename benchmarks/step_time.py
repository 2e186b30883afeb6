"""Where the time of a step goes: the tutorials' loop beside ``ddp_sgd``, part by part.

Usage: ``python -m benchmarks.step_time [--rounds 3]``.

The digits MLP, 32 samples per rank and step, gloo. Both train in turn in the same processes,
``ddp_sgd`` with journal, W&B offline and checkpoints at their defaults. Microseconds per step, on
rank 0.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from benchmarks import harness
from ddp_sgd import Runtime
from ddp_sgd.data import Digits
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.host import free_port
from ddp_sgd.models import MLP

RANKS = (1, 2)
PARTS = {
    "data": (Phase.DATA,),
    "forward": (Phase.FORWARD,),
    "backward, reduction": (Phase.BACKWARD, Phase.ALL_REDUCE),
    "weights": (Phase.OPTIMIZER,),
    "bookkeeping": (Phase.SYNC, Phase.SAVE),
}
"""Components of a step, by the phases that make them up."""

Spent = dict[str, float]
"""Time of a step by part, in microseconds."""


def measure(options: Namespace) -> Iterator[str]:
    """Measure on each number of ranks."""
    found = {
        ranks: run_ranks(ranks, work_as_rank, options.rounds, options.epochs, deadline_s=600.0)[0]
        for ranks in RANKS
    }
    rows = (
        (
            ranks,
            loop,
            *(median(each[part] for each in spent) for part in PARTS),
            [sum(each.values()) for each in spent],
        )
        for ranks, loops in found.items()
        for loop, spent in loops.items()
    )
    yield harness.markdown_table(" | ".join(("ranks", "loop", *PARTS, "whole")), rows)


def work_as_rank(runtime: Runtime, rounds: int, epochs: int) -> dict[str, list[Spent]]:
    """Train by both loops in turn; return what they spent."""
    if runtime.alone:  # the tutorials' loop has a process group all the same
        address = f"tcp://127.0.0.1:{free_port()}"
        dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            "tutorial": partial(tutorial, epochs),
            "ddp_sgd": partial(ours, runtime, epochs, folder),
        }
        found = harness.alternate(loops, rounds)
        dist.barrier()
    if runtime.alone:
        dist.destroy_process_group()
    return found


def tutorial(epochs: int) -> Spent:
    """Train by the loop of PyTorch's tutorials, phase by phase."""
    digits = Digits()
    dataset = TensorDataset(torch.from_numpy(digits.inputs), torch.from_numpy(digits.targets))
    sampler: DistributedSampler[Any] = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)
    model = DistributedDataParallel(MLP(inputs=64, hidden=[64, 64], classes=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    progress, steps, total = ProgressTracker(), 0, 0.0
    for epoch in range(epochs):
        progress.enter(Phase.DATA)
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            progress.enter(Phase.FORWARD)
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            progress.enter(Phase.BACKWARD)
            loss.backward()
            progress.enter(Phase.OPTIMIZER)
            optimizer.step()
            progress.enter(Phase.SYNC)
            total += loss.item()
            steps += 1
            progress.enter(Phase.DATA)
    return by_part(progress.spent_s(), steps)


def ours(runtime: Runtime, epochs: int, folder: str) -> Spent:
    """Train by ``ddp_sgd`` at its defaults, but for the evaluation, which is not in the other."""
    progress = ProgressTracker(time.perf_counter)
    sections = {"output_dir": folder, "epochs": epochs, "wandb": {"mode": "offline"}}
    steps = harness.fit_with(progress, runtime, Digits(), **sections)
    return by_part(progress.spent_s(), steps)


def by_part(spent_s: Any, steps: int) -> Spent:
    """Sum phases up to parts, in microseconds per step."""
    return {
        part: 1e6 * sum(spent_s.get(phase, 0.0) for phase in phases) / steps
        for part, phases in PARTS.items()
    }


if __name__ == "__main__":
    parser = harness.option_parser(__doc__, rounds=3)
    parser.add_argument("--epochs", type=int, default=120)
    harness.run_benchmark("step_time", parser, measure)
