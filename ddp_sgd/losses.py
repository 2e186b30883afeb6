"""The loss as a sum over units, so that it can be split over ranks and micro-batches exactly."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ddp_sgd.errors import ConfigError

LossFunction = Callable[[Any, Any], torch.Tensor]

_PER_TARGET = (nn.CrossEntropyLoss, nn.NLLLoss)


class Objective:
    """What the run minimizes: the loss summed over the units of a step, by their number.

    A unit is a sample, for a loss that gives the mean over samples. Cross entropy with class
    weights, with ignored targets or with one target a pixel or token divides by the weight of the
    targets instead; then that weight is the unit, since only so a split over ranks equals the
    whole.

    Args:
        loss: Module or function of (outputs, targets) that returns the mean, a tensor without
            dimensions.
        targets: Targets of the data set, to tell which kind of unit applies.
        complete: Whether these are all targets, so that none that is ignored can turn up later.

    Raises:
        ConfigError: The loss is set to return something else than a mean.

    Attributes:
        ignore_index: Target that the loss leaves out.
        counts_samples: Whether the unit is a sample, whose number every rank knows without asking.
    """

    def __init__(self, loss: LossFunction, targets: Any, *, complete: bool = True) -> None:
        reduction = getattr(loss, "reduction", "mean")
        if reduction != "mean":
            raise ConfigError(
                f"loss.init_args.reduction is {reduction}; leave it at mean: the run weights "
                "every micro-batch itself."
            )
        self.counts_samples = not _weighs_targets(loss, targets, complete=complete)
        self.ignore_index: int = getattr(loss, "ignore_index", -100)
        self._loss: Any = loss
        if not self.counts_samples:
            self._loss = copy.copy(loss)
            self._loss.reduction = "sum"
            weight = self._loss.weight
            self._weight = None if weight is None else weight.detach().double().cpu()

    def __call__(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Compute the loss of a micro-batch, which times ``weight`` is the sum over its units.

        Args:
            outputs: What the model returned.
            targets: What the data set gave.

        Returns:
            Tensor without dimensions.
        """
        loss: torch.Tensor = self._loss(outputs, targets)
        return loss

    def weight(self, samples: int) -> int:
        """Tell by what the loss of a micro-batch is multiplied: a mean by its samples, a sum by 1.

        Args:
            samples: True number of samples; with 0 the result is 0.
        """
        return samples if self.counts_samples else min(samples, 1)

    def total(self, outputs: Any, targets: Any, samples: int) -> torch.Tensor:
        """Sum the loss over the units of a micro-batch; without samples it is 0."""
        return self(outputs, targets) * self.weight(samples)

    def units(self, targets: torch.Tensor, samples: int) -> float:
        """Count the units of a micro-batch, for a loss that weighs targets.

        Args:
            targets: Integer tensor of shape (m, ...), on the host, so that no device is waited for.
            samples: True number of samples; with 0 the result is 0.
        """
        counted = targets[targets != self.ignore_index]
        units = counted.numel() if self._weight is None else float(self._weight[counted].sum())
        return float(units) * min(samples, 1)


def wide_float(device: torch.device) -> torch.dtype:
    """Return the widest float type of a device, for sums and counts; Metal has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _weighs_targets(loss: LossFunction, targets: Any, *, complete: bool) -> bool:
    if not isinstance(loss, _PER_TARGET) or not isinstance(targets, torch.Tensor):
        return False
    if targets.is_floating_point():  # probabilities: torch takes the mean over samples
        return False
    ignores = not complete or bool((targets == loss.ignore_index).any())
    return loss.weight is not None or ignores or targets.ndim > 1
