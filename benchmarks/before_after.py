"""Steps per second of the digits MLP before and after a change: two source trees, in turn.

Usage: ``python -m benchmarks.before_after TREE [--pairs 15] [--ranks 1] [--write FOLDER]``. TREE is
a checkout of the state before, such as one made by ``git worktree add``; after is this one. A pair
is a run of each, the second first in every other pair. Counted are the steps after the first tenth.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev

EPOCHS = 150
HERE = Path(__file__).parent.parent
T_95 = {4: 2.776, 9: 2.262, 14: 2.145, 19: 2.093, 29: 2.045}
"""Quantiles of Student's distribution, two-sided, by degrees of freedom."""


def main() -> None:
    """Measure, print a table, and keep it if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tree", type=Path)
    parser.add_argument("--pairs", type=int, default=15, choices=[n + 1 for n in T_95])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    pairs = [
        in_turn(options.tree.resolve(), number, options.ranks, options.epochs)
        for number in range(options.pairs)
    ]
    text = report(pairs, options.ranks, load)
    print(text)
    if options.write:
        name = f"before_after_{os.cpu_count()}cpu_{datetime.now(UTC):%Y%m}.md"
        with (options.write / name).open("a") as stream:
            stream.write(text + "\n")


def in_turn(before: Path, number: int, ranks: int, epochs: int) -> tuple[float, float]:
    """Return steps per second before and after, measured one right after the other."""
    trees = [before, HERE] if number % 2 == 0 else [HERE, before]
    found = {tree: steps_per_second(tree, ranks, epochs) for tree in trees}
    return found[before], found[HERE]


def steps_per_second(tree: Path, ranks: int, epochs: int) -> float:
    """Train once, and count the steps after the first tenth."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, *(start if ranks > 1 else []), "-m", "ddp_sgd.train"]
        words += [f"--epochs={epochs}", f"--output_dir={folder}", "--wandb.mode=disabled"]
        words += [f"--eval.every_epochs={epochs}", f"--checkpoint.every_epochs={epochs}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
        subprocess.run(words, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "digits" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "train"]
    first, last = rows[len(rows) // 10], rows[-1]
    rate: float = (last["step"] - first["step"]) / (last["time"] - first["time"])
    return rate


def report(pairs: list[tuple[float, float]], ranks: int, load: float) -> str:
    """Write the ratios, with the 95 % interval of their geometric mean."""
    logs = [math.log(after / before) for before, after in pairs]
    half = T_95[len(pairs) - 1] * stdev(logs) / math.sqrt(len(logs))
    low, middle, high = (math.exp(mean(logs) + shift) for shift in (-half, 0.0, half))
    before, after = (median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(math.exp(value) for value in logs)
    commit = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(commit, capture_output=True, text=True, check=False)
    return (
        f"`python -m benchmarks.before_after TREE --pairs {len(pairs)} --ranks {ranks}`, "
        f"{datetime.now(UTC):%Y-%m-%d}, after is {done.stdout.strip()}, {os.cpu_count()} CPUs, "
        f"{platform.machine()}, Python {platform.python_version()}, torch {version('torch')}, one "
        f"thread a rank, load average {load:.1f} before.\n\n"
        "| ranks | before, steps/s | after, steps/s | ratio | 95 % interval | lowest, highest |\n"
        "|---|---|---|---|---|---|\n"
        f"| {ranks} | {before:,.0f} | {after:,.0f} | {middle:.3f} | {low:.3f} to {high:.3f} | "
        f"{ratios[0]:.3f}, {ratios[-1]:.3f} |\n"
    )


if __name__ == "__main__":
    main()
