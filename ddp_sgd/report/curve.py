"""The learning rate of a run, drawn as text."""

from itertools import pairwise

from ddp_sgd.optim.schedule import Schedule
from ddp_sgd.plan import Plan
from ddp_sgd.report.plan_table import epochs_in_words

_LEVELS = ".-'"
"""Marks for the lower, the middle and the upper third of a line of text."""


def curve(plan: Plan, schedule: Schedule, *, width: int = 60, height: int = 10) -> str:
    """Draw the learning rate against the epoch.

    Args:
        plan: The run's arithmetic.
        schedule: Factor of ``plan.peak_lr`` at each step.
        width: Columns of the plot itself, at least 30; labels come on top.
        height: Lines of the plot itself, at least 2.

    Returns:
        ``height`` lines with the rate on the left, from 0 to its largest value, then the axis and
        its labels, in epochs.
    """
    last = plan.total_steps - 1
    steps = [round(column * last / (width - 1)) for column in range(width)]
    rates = [plan.peak_lr * schedule(step) for step in steps]
    top = max(rates) or 1.0
    finest = height * len(_LEVELS) - 1
    lines = _draw([round(rate / top * finest) for rate in rates], height)
    labels = {0: f"{top:.4g}", height - 1: "0"}
    margin = max(len("rate"), *map(len, labels.values()))
    return "\n".join(
        [
            f"{'rate':>{margin}}",
            *(f"{labels.get(row, ''):>{margin}} |{line}" for row, line in enumerate(lines)),
            f"{'':>{margin}} +{'-' * width}",
            f"{'':>{margin}}  {_epochs_axis(plan, width)}",
        ]
    )


def _draw(levels: list[int], height: int) -> list[str]:
    """Put a mark in every column and join those more than a line apart; top line first."""
    rows = [divmod(level, len(_LEVELS)) for level in levels]
    canvas = [[" "] * len(levels) for _ in range(height)]
    for column, ((before, _), (now, _)) in enumerate(pairwise(rows)):
        for row in range(min(before, now) + 1, max(before, now)):
            canvas[row][column + 1] = "|"
    for column, (row, third) in enumerate(rows):
        canvas[row][column] = _LEVELS[third]
    return ["".join(line).rstrip() for line in reversed(canvas)]


def _epochs_axis(plan: Plan, width: int) -> str:
    """Label the start, the middle and the end of the axis."""
    middle, end = f"{plan.passes / 2:.4g}", epochs_in_words(plan)
    left = f"0{middle:>{(width + len(middle)) // 2 - 1}}"
    return f"{left}{end:>{width - len(left)}}"
