"""What ``ddp_sgd`` must reach, and whether it does."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.peers.lineup import BARE, FLAT, OURS, TUTORIAL
from benchmarks.peers.measuring import Record
from benchmarks.peers.summary import Summary, cpu_us, first_step_s, peak_mb, steps_per_s

CPU_US = 80.0
"""What a step of the MLP on one rank may cost beside its arithmetic, in us of CPU time."""

_SPEED = {
    ("mlp", 1): (4.0, 0.75),
    ("mlp", 2): (1.3, 0.95),
    ("convnet", 1): (1.1, None),
    ("convnet", 2): (1.0, None),
    ("resnet", 1): (1.0, None),
    ("resnet", 2): (1.0, None),
}
"""Least speed by workload and ranks: relative to the fastest framework, and to the flat loop."""


@dataclass(frozen=True, slots=True)
class Goal:
    """Something to reach, measured in every round.

    Args:
        text: What.
        limit: On which side of what it must lie, for people.
        values: One a round.
        is_reached: Whether the median is on the right side of the limit.
    """

    text: str
    limit: str
    values: list[float]
    is_reached: bool


def goals(records: list[Record]) -> list[Goal]:
    """List all goals for which there are measurements."""
    found = []
    for workload, ranks in _SPEED:
        summary = Summary(records, workload, ranks)
        found += [*_speed(summary), *_start(summary), *_memory(summary), *_work(summary)]
    return found


def _speed(summary: Summary) -> Iterator[Goal]:
    framework = summary.best_framework(steps_per_s)
    of_framework, of_flat = _SPEED[summary.workload, summary.ranks]
    where = _where(summary)
    values = summary.ratios(OURS, framework, steps_per_s)
    yield from _at_least(f"{where}: speed / fastest framework ({framework})", values, of_framework)
    if of_flat is not None:
        values = summary.ratios(OURS, FLAT, steps_per_s)
        yield from _at_least(f"{where}: speed / flat loop", values, of_flat)


def _start(summary: Summary) -> Iterator[Goal]:
    """Compare the time to the first step; by the MLP, where ten steps take no time."""
    if summary.workload != "mlp":
        return
    framework = summary.best_framework(first_step_s, of=min)
    where = f"{_where(summary)}: time to the first step"
    values = summary.ratios(OURS, framework, first_step_s)
    yield from _below(f"{where} / quickest framework ({framework})", values, 1.0)
    values = summary.ratios(OURS, TUTORIAL, first_step_s)
    yield from _at_most(f"{where} / tutorial", values, 0.8)


def _memory(summary: Summary) -> Iterator[Goal]:
    values = summary.ratios(OURS, TUTORIAL, peak_mb)
    yield from _at_most(f"{_where(summary)}: peak memory / tutorial", values, 1.0)


def _work(summary: Summary) -> Iterator[Goal]:
    values = summary.differences(OURS, BARE, cpu_us)
    text = f"{_where(summary)}: CPU time a step beside its arithmetic, us"
    yield from _at_most(text, values, CPU_US)


def _where(summary: Summary) -> str:
    return f"{summary.workload}, {summary.ranks} rank{'s' if summary.ranks > 1 else ''}"


def _at_least(text: str, values: list[float], limit: float) -> Iterator[Goal]:
    if values:
        yield Goal(text, f"at least {limit:g}", values, median(values) >= limit)


def _at_most(text: str, values: list[float], limit: float) -> Iterator[Goal]:
    if values:
        yield Goal(text, f"at most {limit:g}", values, median(values) <= limit)


def _below(text: str, values: list[float], limit: float) -> Iterator[Goal]:
    if values:
        yield Goal(text, f"below {limit:g}", values, median(values) < limit)
