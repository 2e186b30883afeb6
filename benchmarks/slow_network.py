"""Slow networks: time to 95 % accuracy, by how gradients are exchanged.

Usage: ``python -m benchmarks.slow_network [--rounds 3]``, as root on Linux; a round takes about 2
minutes.

2 ranks of ``ddp_sgd.train``, each in a network namespace of its own, with `tc tbf` at what each
sends, on the CPUs of one machine. The digits, an MLP of 64-512-512-10 (1.2 MB of gradients), 32
samples per rank and step, lr 0.2 for 64 samples, 6 epochs of 23 steps, scored after each. Time runs
from the fourth step to the first score of 95 % or more. The gain is the time of plain DDP in the
same round by that time.
"""

import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from benchmarks import harness
from benchmarks.namespaces import RATES, limit, machines, run_on_all, sent_bytes

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
    """What a run came to."""

    # From the first row of the journal, after 4 steps, to the first evaluation at the target or
    # above. Starts are left out: what is imported before the first step or in it differs.
    reached_s: float | None
    accuracy: float  # of the last evaluation
    step_ms: float  # mean, without the first row of the journal
    sent_kb: float  # by rank 0 per step, start and end of the run included


def measure(options: Namespace) -> Iterator[str]:
    """Run every contestant at every rate, in turn."""
    with machines(2) as nodes:
        cases = {
            (rate, name): partial(train, nodes, rate, words)
            for rate in RATES
            for name, words in CONTESTANTS.items()
        }
        yield report(harness.alternate(cases, options.rounds))


def train(nodes: list[Any], rate: str, options: tuple[str, ...]) -> Run:
    """Train once, and read the journal."""
    limit(nodes, rate)
    before = sent_bytes(nodes[0])
    with tempfile.TemporaryDirectory() as folder:
        run_on_all(nodes, "-m", "ddp_sgd.train", f"--output_dir={folder}", *WORKLOAD, *options)
        steps, scores = (
            harness.journal_rows(Path(folder) / "digits", event) for event in ("train", "eval")
        )
    return summarize(steps, scores, sent_bytes(nodes[0]) - before)


def summarize(steps: list[dict[str, Any]], scores: list[dict[str, Any]], sent: int) -> Run:
    """Read a run off the rows of its journal, of training and of evaluation."""
    start = steps[0]["time"]
    reached = (row["time"] - start for row in scores if row["eval/accuracy"] >= TARGET)
    return Run(
        next(reached, None),
        scores[-1]["eval/accuracy"],
        mean(row["time/step_ms"] for row in steps[1:]),
        sent / 1e3 / steps[-1]["step"],
    )


def report(runs: dict[tuple[str, str], list[Run]]) -> str:
    """Write the result."""

    def row(rate: str, name: str) -> list[object]:
        found = runs[rate, name]
        gains = [
            plain.reached_s / run.reached_s
            for plain, run in zip(runs[rate, PLAIN], found, strict=True)
            if plain.reached_s and run.reached_s
        ]
        reached_s, accuracies, steps_ms, sent_kb = map(list, zip(*found, strict=True))
        reached = sum(each is not None for each in reached_s)
        percents = [100 * accuracy for accuracy in accuracies]
        figures = [reached_s, gains, steps_ms, sent_kb, percents]
        return [rate, name, *figures, f"{reached} of {len(found)}"]

    headings = f"link | exchange | s to {100 * TARGET:g} % | gain | ms per step"
    headings += " | kB sent per step | final accuracy, % | reached"
    return harness.markdown_table(headings, (row(*key) for key in runs))


if __name__ == "__main__":
    harness.run_benchmark("slow_networks", harness.option_parser(__doc__, rounds=3), measure)
