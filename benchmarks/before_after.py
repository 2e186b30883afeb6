"""Steps per second of the digits MLP before and after a change: two source trees.

Usage: ``python -m benchmarks.before_after TREE [--rounds 15] [--ranks 1] [--save_every N]``. TREE
is a checkout of the state before, such as one made by ``git worktree add``; after is this one.

Counted are the steps after the first tenth. The ratio is the geometric mean over the rounds.
"""

import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import harness


def measure(options: Namespace) -> Iterator[str]:
    """Train from both trees in turn."""
    saves = options.save_every or options.epochs
    trees = {"before": options.tree.resolve(), "after": harness.ROOT}
    work = (options.ranks, options.epochs, saves)
    cases = {name: partial(steps_per_s, tree, *work) for name, tree in trees.items()}
    found = harness.alternate(cases, options.rounds)
    git = ("git", "-C", str(harness.ROOT), "rev-parse", "--short", "HEAD")
    after = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    yield f"After is {after}; a save every {saves} of {options.epochs} epochs."
    yield table(list(zip(found["before"], found["after"], strict=True)), options.ranks)


def steps_per_s(tree: Path, ranks: int, epochs: int, saves: int) -> float:
    """Train once, and count the steps after the first tenth."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "ddp_sgd.train", f"--epochs={epochs}", f"--output_dir={folder}"]
        words += ["--wandb.mode=disabled", f"--eval.every_epochs={epochs}"]
        words += [f"--checkpoint.every_epochs={saves}"]
        harness.run_python(*words, ranks=ranks, cwd=Path(folder), PYTHONPATH=str(tree))
        rows = harness.journal_rows(Path(folder) / "digits")
    first, last = rows[len(rows) // 10], rows[-1]
    return float((last["step"] - first["step"]) / (last["time"] - first["time"]))


def table(pairs: list[tuple[float, float]], ranks: int) -> str:
    """Write the ratios, with the 95 % interval of their geometric mean."""
    low, middle, high = (f"{value:.3f}" for value in harness.ratio_interval(pairs))
    before, after = map(list, zip(*pairs, strict=True))
    ratios = [each / other for other, each in pairs]
    return harness.markdown_table(
        "ranks | before, steps/s | after, steps/s | ratio | 95 % interval | in pairs",
        [(ranks, before, after, middle, f"{low} to {high}", ratios)],
    )


if __name__ == "__main__":
    parser = harness.option_parser(__doc__, rounds=15)
    parser.add_argument("tree", type=Path)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--save_every", type=int, help="epochs; by default at the end only")
    harness.run_benchmark("before_after", parser, measure)
