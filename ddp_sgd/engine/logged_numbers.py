"""Logged numbers: what is summed on the device beside the loss, each with its own units."""

from collections.abc import Mapping
from typing import Any

import torch

from ddp_sgd.losses import Objective
from ddp_sgd.named_losses import ACCURACY, LOSS, wide_float


def logged_names(objective: Objective) -> tuple[str, ...]:
    """List the numbers that training logs beside the loss, in the order of ``sum_numbers``."""
    return (*objective.form.names, *([ACCURACY] if objective.counts_correct else []))


def sum_numbers(
    objective: Objective,
    values: Mapping[str, torch.Tensor],
    outputs: Any,
    targets: Any,
    *,
    samples: int,
    units: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Sum the numbers of a micro-batch over its units; nothing waits for the device.

    Args:
        objective: What is minimized.
        values: Its ``values``.
        outputs: What the model returned.
        targets: Targets of the micro-batch, on the device.
        samples: Its true number of samples.
        units: Units of each number, by name; None: its samples.

    Returns:
        Tensor of shape (2, n): sums, and units, of ``logged_names``.
    """
    wide = wide_float(values[LOSS].device)
    parts = []
    if names := objective.form.names:
        numbers = torch.stack([values[name].detach() for name in names]).to(wide)
        counts = torch.full_like(numbers, samples) if units is None else stack_units(units, names)
        parts.append(torch.stack([times(numbers, counts), counts]))
    if objective.counts_correct:
        counted = (targets != objective.ignore_index) * min(samples, 1)
        correct = (outputs.detach().argmax(dim=1) == targets) * counted
        parts.append(torch.stack([correct.sum(), counted.sum()])[:, None].to(wide))
    return torch.cat(parts, dim=1)


def stack_units(units: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
    """Return the units of some numbers in one tensor."""
    return torch.stack([units[name] for name in names])


def times(numbers: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
    """Multiply numbers by their units; what has none is 0, even if it is not finite."""
    return (numbers * units).masked_fill(units == 0, 0.0)


def sum_of_means(means: Mapping[str, float | None]) -> float | None:
    """Add up means over different units: the loss of numbers without a ``loss`` among them.

    Args:
        means: By name; accuracy is no part of the loss. None: there were no units.
    """
    known = [mean for name, mean in means.items() if name != ACCURACY and mean is not None]
    return sum(known) if known else None
