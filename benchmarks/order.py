"""The first batch of an epoch, and of a resume, for up to 1e9 samples: time and memory.

Usage: ``python -m benchmarks.order [--rounds 5] [--most 1000000000]``; a round takes about a minute
and 8 GB.

Indices of rank 0, 32 per batch, epoch 1. Each case is a process of its own, with imports done; its
first batch is the first thing that it does, the sampler included. Memory is the peak of what is
resident, less what was before. A later batch is the mean of up to 1,000 after the first; where an
epoch has fewer than 100 there is none. ``DistributedSampler``, up to 1e8 samples, has no position
in the epoch: a resume iterates over what was read, at the cost of a later batch for each.
"""

import time
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DistributedSampler

from benchmarks import harness
from ddp_sgd.data.sampler import TrainSampler

MODULE = "benchmarks.order"
BATCH = 32
SAMPLES = (10**4, 10**6, 10**7, 10**8, 10**9)
MOST_OF_TORCH = 10**8
WORLD_SIZES = (1, 1024)
PLACES = {"its start": 0.0, "the middle": 0.5, "its last step": 1.0}
STEADY = 1000
"""Most later batches."""

Case = tuple[str, int, int, str]
"""Name of the sampler, samples, ranks, and the place in the epoch."""
Figures = dict[str, float | None]


def cases(most: int) -> Iterator[Case]:
    """Yield what is measured in a round."""
    for samples in (n for n in SAMPLES if n <= most):
        for world_size in WORLD_SIZES:
            for place in PLACES:
                yield "TrainSampler", samples, world_size, place
            if samples <= MOST_OF_TORCH:
                yield "DistributedSampler", samples, world_size, "its start"


def batches_of(case: Case) -> Iterator[Any]:
    """Begin to iterate over the batches of rank 0, from a place in epoch 1."""
    name, samples, world_size, place = case
    if name == "DistributedSampler":
        sampler: DistributedSampler[int] = DistributedSampler(
            range(samples),  # type: ignore[arg-type]  # only its length is asked for
            num_replicas=world_size,
            rank=0,
        )
        sampler.set_epoch(1)
        return iter(BatchSampler(sampler, BATCH, drop_last=False))
    ours = TrainSampler(
        samples,
        global_batch=BATCH * world_size,
        batch_size=BATCH,
        rank=0,
        world_size=world_size,
    )
    ours.set_epoch(1, round(PLACES[place] * (ours.steps_per_epoch - 1)))
    return iter(ours)


def measure_here(*case: Any) -> Figures:
    """Measure one case in this process.

    Returns:
        Time of the first batch in ms; memory that it took at its peak, in MB; time of a later batch
        in us, None if there are fewer than a hundred.
    """
    before_kb = resident_kb("VmRSS")
    began = time.perf_counter()
    batches = batches_of(case)
    first = next(batches)
    first_ms = 1e3 * (time.perf_counter() - began)
    peak_kb = resident_kb("VmHWM") - before_kb
    indices = np.asarray(getattr(first, "indices", first)).tolist()
    if not all(0 <= index < case[1] for index in indices):
        raise RuntimeError(f"{case} gives {first}")
    began = time.perf_counter()
    count = sum(1 for _ in islice(batches, STEADY))
    later_us = 1e6 * (time.perf_counter() - began) / count if count >= 100 else None
    return {"first_ms": first_ms, "peak_mb": peak_kb * 1024 / 1e6, "later_us": later_us}


def resident_kb(key: str) -> int:
    """Read the memory of this process: ``VmRSS`` now, after which ``VmHWM`` is its peak."""
    if key == "VmRSS":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again, see man 5 proc
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure(options: Namespace) -> Iterator[str]:
    """Measure all cases in turn, each in a process of its own."""
    apart = {case: partial(harness.run_worker, MODULE, *case) for case in cases(options.most)}
    yield from report(harness.alternate(apart, options.rounds))


def report(found: dict[Case, list[Figures]]) -> Iterator[str]:
    """Write the result."""
    keys = ("first_ms", "peak_mb", "later_us")
    yield harness.markdown_table(
        "sampler | samples | ranks | epoch from | first batch, ms | peak memory, MB | later, us",
        (
            (f"`{name}`", f"{samples:.0e}", *where, *([row[key] for row in rows] for key in keys))
            for (name, samples, *where), rows in found.items()
        ),
    )
    ours = [row for (name, *_), rows in found.items() if name == "TrainSampler" for row in rows]
    slowest_ms = max(row["first_ms"] or 0.0 for row in ours)
    yield f"The slowest first batch of `TrainSampler` took {slowest_ms:.1f} ms."


if __name__ == "__main__":
    parser = harness.option_parser(__doc__, rounds=5)
    parser.add_argument("--most", type=int, default=max(SAMPLES), help="samples")
    harness.run_benchmark(
        "order", parser, measure, worker=measure_here, packages=("torch", "numpy")
    )
