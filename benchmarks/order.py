"""The first batch of an epoch, and of a resume, for up to 1e9 samples: time and memory.

Usage: ``python -m benchmarks.order [--rounds 5] [--most 1000000000] [--write FOLDER]``; a round
takes about a minute and 8 GB. Beside ``ddp_sgd.data.sampler.Order`` stands torch's
``DistributedSampler`` up to 1e8 samples, which has no position: a resume iterates up to it. Each
case is a process of its own that has imported what it needs, and reads its first batch ever.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from torch.utils.data import BatchSampler, DistributedSampler

from ddp_sgd.data.sampler import TrainSampler

BATCH = 32
SAMPLES = (10**4, 10**6, 10**7, 10**8, 10**9)
MOST_OF_TORCH = 10**8
WORLD_SIZES = (1, 1024)
PLACES = {"its start": 0.0, "the middle": 0.5, "its last step": 1.0}
STEADY = 1000
"""Most batches after the first whose mean cost is told."""

Case = tuple[str, int, int, str]
"""``Order`` or ``DistributedSampler``, samples, ranks, and the place in the epoch."""


def cases(most: int) -> Iterator[Case]:
    """Yield what is measured in a round."""
    for samples in (n for n in SAMPLES if n <= most):
        for world_size in WORLD_SIZES:
            for place in PLACES:
                yield "Order", samples, world_size, place
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
    order = TrainSampler(
        samples,
        global_batch=BATCH * world_size,
        batch_size=BATCH,
        rank=0,
        world_size=world_size,
    )
    order.set_epoch(1, round(PLACES[place] * (order.steps_per_epoch - 1)))
    return iter(order)


def measure(case: Case) -> dict[str, float | None]:
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


def measure_apart(case: Case) -> dict[str, float | None]:
    """Measure one case in a process of its own."""
    words = [sys.executable, "-m", "benchmarks.order", "--case", json.dumps(case)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=600)
    return json.loads(done.stdout)


def spread(values: list[float | None], digits: int) -> str:
    """Write the median, and the lowest and highest value."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, middle, high = (
        f"{value:,.{digits}f}" for value in (min(known), median(known), max(known))
    )
    return f"{middle} ({low} to {high})"


def report(found: dict[Case, list[dict[str, float | None]]], command: str) -> str:
    """Write the result in Markdown."""
    lines = [
        "| who | samples | ranks | epoch from | first batch, ms | peak memory, MB "
        "| a later batch, us |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, samples, world_size, place), each in found.items():
        keys = {"first_ms": 2, "peak_mb": 1, "later_us": 1}
        figures = [spread([one[key] for one in each], digits) for key, digits in keys.items()]
        cells = [f"`{name}`", f"{samples:.0e}", str(world_size), place, *figures]
        lines.append(f"| {' | '.join(cells)} |")
    ours = [one for (name, *_), each in found.items() if name == "Order" for one in each]
    slowest_ms = max(one["first_ms"] or 0.0 for one in ours)
    rounds = len(next(iter(found.values())))
    return f"""# The first batch of an epoch, up to {max(n for _, n, *_ in found):.0e} samples

{command}, {os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, torch \
{version("torch")}, numpy {version("numpy")}.

Indices of rank 0, {BATCH} a batch, epoch 1. Each case is a process of its own, with imports done; \
its first batch is the first thing that it does, the sampler included. Memory is the peak of what \
is resident, less what was before. `a later batch` is the mean of up to {STEADY:,} after the \
first; where an epoch has fewer than 100 there is none. Median over {rounds} rounds \
(lowest to highest).

{chr(10).join(lines)}

The slowest first batch of `Order`, of all cases and rounds, took {slowest_ms:.1f} ms. \
`DistributedSampler` has no place in the epoch: a resume iterates over what was read, at the cost \
of a later batch for each.
"""


def main() -> None:
    """Measure, print, and keep the result if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--most", type=int, default=max(SAMPLES), help="samples")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(tuple(options.case))))
        return
    load = os.getloadavg()[0]
    found: dict[Case, list[dict[str, float | None]]] = defaultdict(list)
    for _ in range(options.rounds):
        for case in cases(options.most):
            found[case].append(measure_apart(case))
    command = (
        f"`python -m benchmarks.order --rounds {options.rounds}`, {datetime.now(UTC):%Y-%m-%d}, "
        f"load average {load:.1f} before"
    )
    text = report(found, command)
    print(text)
    if options.write:
        path = options.write / f"order_{os.cpu_count()}cpu_{datetime.now(UTC):%Y%m}.md"
        path.write_text(text)


if __name__ == "__main__":
    main()
