"""Time to a fixed accuracy between 2 machines behind a slow link, by how gradients are exchanged.

Usage: ``python -m benchmarks.slow_network [--rounds 3] [--write FOLDER]``, as root on Linux; a
round takes about 2 minutes. The machines are namespaces, and ``tc tbf`` limits what each sends.
Every run is ``python -m ddp_sgd.train`` on both; contestants take turns within a round.
"""

import argparse
import json
import os
import platform
import tempfile
from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from benchmarks.namespaces import limit, machines, sent_bytes, start_on_all

RATES = {"100 Mbit/s": "100mbit", "1 Gbit/s": "1gbit"}
TARGET = 0.95
EPOCHS = 6
WORKLOAD = (
    f"--epochs={EPOCHS}",
    "--model.init_args.hidden=[512, 512]",
    "--data.batch_size=32",
    "--optim.lr=0.2",
    "--optim.reference_batch=64",
    "--log.every_steps=4",
    f"--checkpoint.every_epochs={EPOCHS}",
    "--wandb.mode=disabled",
)
PLAIN = "plain DDP"
CONTESTANTS = {
    PLAIN: ("--parallel.replica=ddp",),
    "one all-reduce (auto)": (),
    "bf16": ("--parallel.compression=bf16",),
    "fp16": ("--parallel.compression=fp16",),
    "powersgd": ("--parallel.compression=powersgd",),
    "local SGD, period 8": ("--parallel.local_sgd.start_step=23", "--parallel.local_sgd.period=8"),
}


class Run(NamedTuple):
    """What a run came to.

    Args:
        reached_s: From the first row of the journal, after 4 steps, to the first evaluation at the
            target or above, in seconds; None if there was none. Starts are left out: what is
            imported before the first step or in it differs.
        accuracy: Of the last evaluation.
        step_ms: Mean time of a step, without the first row of the journal.
        sent_kb: Sent by rank 0 for each step, start and end of the run included.
    """

    reached_s: float | None
    accuracy: float
    step_ms: float
    sent_kb: float


def measure(rounds: int) -> dict[tuple[str, str], list[Run]]:
    """Run every contestant at every rate, in turn, several times."""
    runs: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for _ in range(rounds):
        with machines(2) as nodes:
            for rate, tc_rate in RATES.items():
                limit(nodes, tc_rate)
                for name, options in CONTESTANTS.items():
                    runs[rate, name].append(train(nodes, options))
    return runs


def train(nodes: list[Any], options: tuple[str, ...]) -> Run:
    """Train once, and read the journal."""
    before = sent_bytes(nodes[0])
    with tempfile.TemporaryDirectory() as folder:
        words = ("-m", "ddp_sgd.train", f"--output_dir={folder}", *WORKLOAD, *options)
        for process in start_on_all(nodes, *words):
            _, said = process.communicate(timeout=300)
            if process.returncode:
                raise RuntimeError(said)
        lines = (Path(folder) / "digits" / "metrics.jsonl").read_text().splitlines()
    return summarize([json.loads(line) for line in lines], sent_bytes(nodes[0]) - before)


def summarize(rows: list[dict[str, Any]], sent: int) -> Run:
    """Read a run off the rows of its journal."""
    steps = [row for row in rows if row["event"] == "train"]
    start = steps[0]["time"]
    scores = [row for row in rows if row["event"] == "eval"]
    reached = (row["time"] - start for row in scores if row["eval/accuracy"] >= TARGET)
    lengths = [row["step"] - last["step"] for last, row in pairwise(steps)]
    spent_ms = sum(
        count * row["time/step_ms"] for count, row in zip(lengths, steps[1:], strict=True)
    )
    return Run(
        next(reached, None),
        scores[-1]["eval/accuracy"],
        spent_ms / sum(lengths),
        sent / 1e3 / steps[-1]["step"],
    )


def report(runs: dict[tuple[str, str], list[Run]], rounds: int, loads: list[float]) -> str:
    """Write the result in Markdown."""
    rows = []
    for (rate, name), found in runs.items():
        times = [run.reached_s for run in found if run.reached_s is not None]
        pairs = [
            plain.reached_s / run.reached_s
            for plain, run in zip(runs[rate, PLAIN], found, strict=True)
            if plain.reached_s and run.reached_s
        ]
        columns = (
            spread(times, 2),
            spread(pairs, 2),
            spread([run.step_ms for run in found], 1),
            f"{median(run.sent_kb for run in found):,.0f}",
            spread([100 * run.accuracy for run in found], 1),
            f"{len(times)} of {len(found)}",
        )
        rows.append(f"| {rate} | {name} | {' | '.join(columns)} |")
    return f"""# Slow networks: time to {100 * TARGET:g} % by how gradients are exchanged

`python -m benchmarks.slow_network --rounds {rounds}`, {datetime.now(UTC):%Y-%m-%d}, \
{os.cpu_count()} CPUs for both ranks, {platform.machine()}, Python {platform.python_version()}, \
torch {version("torch")}, gloo, one thread a rank, {rounds} alternating rounds; load average \
{loads[0]:.1f} before, {loads[1]:.1f} after.

2 ranks, each in a network namespace of its own, with `tc tbf` at what each sends. The digits, an \
MLP of 64-512-512-10 (1.2 MB of gradients), 32 samples a rank and step, {EPOCHS} epochs of 23 \
steps, scored after each: `python -m ddp_sgd.train {" ".join(WORKLOAD[1:5])}`. Time runs from \
the fourth step to the first score of {100 * TARGET:g} % or more. The gain is the time of plain \
DDP in the same round by that time. Median (lowest to highest).

| link | exchange | s to {100 * TARGET:g} % | gain | ms a step | kB sent a step | \
final accuracy, % | reached |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}
"""


def spread(values: list[float], digits: int) -> str:
    """Say the median, the lowest and the highest."""
    if not values:
        return "-"
    shown = [f"{value:.{digits}f}" for value in (median(values), min(values), max(values))]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def main() -> None:
    """Measure, compare, print, and keep the result if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    runs = measure(options.rounds)
    text = report(runs, options.rounds, [load_before, os.getloadavg()[0]])
    print(text)
    if options.write:
        path = options.write / f"slow_networks_{os.cpu_count()}cpu_{datetime.now(UTC):%Y%m}.md"
        path.write_text(text)


if __name__ == "__main__":
    main()
