"""The result in Markdown."""

import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from benchmarks.peers.equivalence import differences, tolerance
from benchmarks.peers.goals import goals
from benchmarks.peers.lineup import CONTESTANTS, FLAT, TUTORIAL
from benchmarks.peers.measuring import WARM_UP, Record
from benchmarks.peers.summary import Summary, cpu_us, first_step_s, peak_mb, steps_per_s
from benchmarks.peers.workloads import WORKLOADS

_PACKAGES = ("torch", "torchvision", "accelerate", "lightning", "pytorch-ignite", "wandb")
_HEADINGS = (
    "contestant",
    "steps / s",
    "of the tutorials' loop",
    "of the fastest framework",
    "of the flat loop",
    "CPU of a rank, us / step",
    "of its helpers",
    "first step, s",
    "whole, s",
    "MB a rank",
    "steps",
    "loss (may differ by)",
)


def report(records: list[Record], loads: tuple[float, float]) -> str:
    """Write all tables.

    Args:
        records: What was measured.
        loads: Load average before and after.
    """
    parts = [_head(loads), _goals(records)]
    for workload in WORKLOADS:
        for ranks in (1, 2):
            summary = Summary(records, workload, ranks)
            if summary.contestants:
                parts.append(_table(summary))
    parts.append(_differences(records))
    return "\n".join(parts)


def _head(loads: tuple[float, float]) -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    words = " ".join(["python -m benchmarks.peers", *sys.argv[1:]])
    return f"""# The same training by ddp_sgd, by hand, and by other frameworks

`{words}`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPUs ({_cpu()}), {platform.machine()}, \
Python {platform.python_version()}, {versions}; gloo on the CPU, one thread a rank; load average \
{loads[0]:.1f} before, {loads[1]:.1f} after.

Every round runs each contestant once, in an order that moves on by one each time. Figures are \
medians (lowest to highest) over n rounds; ratios are taken within a round. `ddp_sgd` runs by its \
command, with its journal, its checkpoints and W&B offline; its helpers are the processes in which \
it has W&B and writes checkpoints. On one rank the loops with DDP have a group of one, the \
frameworks choose for themselves, which is without DDP. Two ranks are started by torchrun. All \
begin with the same weights, read the same file, and keep the rate constant. Speed \
and CPU time leave the first {WARM_UP:.0%} of the \
steps out. The first step counts from the command on; of `ddp_sgd` it is the first row of its \
journal, which is that of step 10 of the MLP and the ConvNet, and of step 1 of ResNet-18, whose \
rows are written at every step. The loss is that of the final weights on training data, measured \
alike for all.
"""


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "?")


def _goals(records: list[Record]) -> str:
    lines = [
        "## What must be reached",
        "",
        "Judged by the median.",
        "",
        "| figure | goal | measured | n | |",
        "|---|---|---|---|---|",
    ]
    for goal in goals(records):
        conclusion = "reached" if goal.is_reached else "**not reached**"
        lines.append(
            f"| {goal.text} | {goal.limit} | {_spread(goal.values, _ratio)} | {len(goal.values)} "
            f"| {conclusion} |"
        )
    return "\n".join([*lines, ""])


def _table(summary: Summary) -> str:
    plural = "s" if summary.ranks > 1 else ""
    lines = [
        f"## {WORKLOADS[summary.workload].title}; {summary.ranks} rank{plural}",
        "",
        f"| {' | '.join(_HEADINGS)} | n |",
        "|---" * (len(_HEADINGS) + 1) + "|",
    ]
    framework = summary.best_framework(steps_per_s)
    for name in summary.contestants:
        last = summary.rounds(name)[-1]
        allowed = tolerance(last)
        cells = [
            CONTESTANTS[name].title,
            _spread(summary.values(name, steps_per_s), _whole),
            *(
                _spread(summary.ratios(name, other, steps_per_s), _ratio)
                for other in (TUTORIAL, framework, FLAT)
            ),
            _spread(summary.values(name, cpu_us), _whole),
            _spread(summary.values(name, lambda each: each.other_cpu_us), _whole),
            _spread(summary.values(name, first_step_s), _ratio),
            _spread(summary.values(name, lambda each: each.whole_s), _ratio),
            _spread(summary.values(name, peak_mb), _whole),
            str(last.steps),
            f"{last.loss:.5f} ({'any' if allowed is None else f'{allowed:.2g}'})",
            str(len(summary.rounds(name))),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _differences(records: list[Record]) -> str:
    found = differences(records)
    if not found:
        return (
            "Every contestant took the same number of steps in every round, and ended at the loss "
            "of `ddp_sgd` within what is allowed.\n"
        )
    return "\n".join([*(f"**Other work: {line}.**" for line in found), ""])


def _spread(values: list[float], show: Callable[[float], str]) -> str:
    """Show a median, and the lowest and highest value if there are several."""
    if not values:
        return ""
    if len(values) == 1:
        return show(values[0])
    return f"{show(median(values))} ({show(min(values))} to {show(max(values))})"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


def _whole(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"
