"""Units of a step over all ranks, and gradients of losses that give their units themselves."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ddp_sgd.data.device import move
from ddp_sgd.data.loader import StepBatches
from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.losses import Objective
from ddp_sgd.named_losses import counts_on_host, wide_float
from ddp_sgd.tree import map_tensors


class StepUnits(NamedTuple):
    """Units of a step.

    Args:
        local: Units of the loss on this rank; on the device if they were counted there.
        total: The same over all ranks.
        given: For a loss that gives its units: those of each micro-batch by name of the number.
        totals: Those over all ranks of each number that is trained; 1 where there are none.
    """

    local: float | torch.Tensor
    total: float | torch.Tensor
    given: tuple[Mapping[str, torch.Tensor], ...] = ()
    totals: Mapping[str, torch.Tensor] = {}


def count_units(objective: Objective, batches: StepBatches, runtime: Runtime) -> StepUnits:
    """Count the units of this rank and of all; all but samples need one small all-reduce.

    Args:
        objective: What is minimized.
        batches: This rank's part of the step.
        runtime: This process.
    """
    if objective.counts_samples:
        return StepUnits(sum([b.samples for b in batches.micro_batches]), batches.samples)
    device = runtime.device
    if objective.gives_units:
        return _sum_given(objective, batches, runtime)
    own: float | torch.Tensor
    if counts_on_host(device):
        own = sum(objective.units(b.targets, b.samples) for b in batches.micro_batches)
        if runtime.alone:  # a number costs less than a tensor, in a step of small layers
            return StepUnits(own, own if own > 0 else 1.0)
        units = torch.tensor(own, dtype=wide_float(device))
    else:
        pairs = [(move(b.targets, device), b.samples) for b in batches.micro_batches]
        own = torch.stack([objective.units_on_device(*pair) for pair in pairs]).sum()
        units = own.clone()
    return StepUnits(own, _or_one(sum_over_ranks(units, runtime)))


def _sum_given(objective: Objective, batches: StepBatches, runtime: Runtime) -> StepUnits:
    """Sum the units that a loss gives, of each number that is trained."""
    device, names = runtime.device, objective.form.trained
    given = tuple(
        objective.given_units(move(b.targets, device), b.samples, device)
        for b in batches.micro_batches
    )
    own = torch.stack([torch.stack([units[name] for name in names]) for units in given]).sum(dim=0)
    totals = _or_one(sum_over_ranks(own.clone(), runtime)).unbind()
    return StepUnits(own[0], totals[0], given, dict(zip(names, totals, strict=True)))


def _or_one(units: torch.Tensor) -> torch.Tensor:
    """Put 1 in the place of no unit at all: the gradient is zero then.

    A number in place of the ones would be sent to the device each time.
    """
    return torch.where(units > 0, units, torch.ones_like(units))


class Part(NamedTuple):
    """A number whose gradient is taken.

    Args:
        value: Tensor without dimensions.
        gradient: What its backward pass begins with.
        units: Its units in the micro-batch; where they are 0 it has no part in the step, even if
            its value or its gradient is not finite, as that of 0 / 0.
    """

    value: torch.Tensor
    gradient: torch.Tensor
    units: torch.Tensor


class CutOutputs:
    """Outputs of a model for the loss, whose gradients are looked at before the model's pass.

    The backward pass of a mean over nothing gives NaN, also with a gradient of zero. So it stops at
    the outputs, where it is replaced by zero if a part has no units; all on the device.

    Args:
        outputs: What the model returned, with its graph.

    Attributes:
        outputs: The same without, for the loss.
    """

    def __init__(self, outputs: Any) -> None:
        self._model_side: list[torch.Tensor] = []
        self._loss_side: list[torch.Tensor] = []
        self.outputs = map_tensors(self._cut, outputs)

    def _cut(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.requires_grad:
            return tensor
        self._model_side.append(tensor)
        self._loss_side.append(tensor.detach().requires_grad_())
        return self._loss_side[-1]

    def backward(self, parts: Sequence[Part]) -> None:
        """Add the gradient of all parts to that of each parameter.

        Args:
            parts: The numbers that are trained, of ``outputs``.
        """
        sums: list[torch.Tensor | None] = [None] * len(self._loss_side)
        parts = [part for part in parts if part.value.requires_grad]
        for number, part in enumerate(parts, start=1):
            backward(part.value, part.gradient, keep_graph=number < len(parts))
            for place, tensor in enumerate(self._loss_side):
                gradient, tensor.grad = tensor.grad, None
                if gradient is None:
                    continue
                counted = gradient.masked_fill(part.units == 0, 0.0)
                before = sums[place]
                sums[place] = counted if before is None else before + counted
        pairs = [p for p in zip(self._model_side, sums, strict=True) if p[1] is not None]
        if pairs:
            tensors, gradients = zip(*pairs, strict=True)
            _run_backward(tensors, gradients)


def backward(loss: torch.Tensor, gradient: torch.Tensor, *, keep_graph: bool = False) -> None:
    """Add the gradient of ``loss * gradient`` to that of each parameter.

    Args:
        loss: Tensor without dimensions.
        gradient: The same, on the same device.
        keep_graph: Whether another pass goes through a part of the same graph.

    What ``loss.backward(gradient)`` comes to. That imports sympy for a look at the shape, half a
    second in the first step, and takes 18 us more in every step. ``(loss * factor).backward()``
    gives the same bits without sympy, but makes forward and backward pass of the digits MLP a
    quarter slower.
    """
    _run_backward((loss,), (gradient,), keep_graph=keep_graph)


def _run_backward(
    tensors: tuple[torch.Tensor, ...],
    gradients: tuple[torch.Tensor, ...],
    *,
    keep_graph: bool = False,
) -> None:
    create_graph = False
    torch.autograd.Variable._execution_engine.run_backward(
        *(tensors, gradients, keep_graph, create_graph, ()),
        allow_unreachable=True,
        accumulate_grad=True,
    )
