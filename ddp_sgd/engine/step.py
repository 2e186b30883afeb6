"""One step: the exact mean gradient over every sample of every rank, then SGD."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn.utils import clip_grads_with_norm_

from ddp_sgd.data.loader import MicroBatch, StepBatches
from ddp_sgd.distributed.data_parallel import DataParallelModel
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import TrainingBuffers
from ddp_sgd.engine.logged_numbers import logged_names, sum_numbers, times
from ddp_sgd.engine.precision import LossScale
from ddp_sgd.engine.units import CutOutputs, Part, StepUnits, backward, count_units
from ddp_sgd.losses import Objective
from ddp_sgd.named_losses import LOSS
from ddp_sgd.optim.sgd import SGD


@dataclass(slots=True)
class StepResult:
    """What a step leaves behind, on the device, so that nothing waits for it.

    Args:
        losses: Mean loss of each micro-batch of this rank; its sum over units, where units are not
            known on the host; none, where it is a sum of means over different units.
        weights: Units in each of them, or 1; the sum of losses by weights is this rank's loss.
        units: Units of the loss over all ranks: samples, unless the loss weighs targets.
        local_units: Units of this rank; on the device if they were counted there.
        grad_norm: L2 norm of the whole mean gradient, before clipping; equal on all ranks. Where it
            is not finite the step was skipped, on all ranks.
        scaling: With a loss scale, that of the step, and the overflows of the run so far.
        numbers: Of what is logged beside the loss, this rank's sums, then its units.
    """

    losses: list[torch.Tensor]
    weights: list[int]
    units: float | torch.Tensor
    local_units: float | torch.Tensor
    grad_norm: torch.Tensor
    scaling: tuple[torch.Tensor, torch.Tensor] | None = None
    numbers: list[torch.Tensor] = field(default_factory=list)

    def tensors(self) -> list[torch.Tensor]:
        """List what is still on the device: losses, units if they are, norm, scaling, numbers."""
        units = (self.units, self.local_units)
        counted = [each for each in units if isinstance(each, torch.Tensor)]
        return [*self.losses, *counted, self.grad_norm, *(self.scaling or ()), *self.numbers]

    def with_tensors(self, tensors: Sequence[torch.Tensor]) -> "StepResult":
        """Return what another step of the same form leaves behind.

        Args:
            tensors: Its ``tensors``.
        """
        rest = iter(tensors)
        losses = list(islice(rest, len(self.losses)))
        units, own = (
            next(rest) if isinstance(each, torch.Tensor) else each
            for each in (self.units, self.local_units)
        )
        norm = next(rest)
        scaling = (next(rest), next(rest)) if self.scaling else None
        return StepResult(losses, self.weights, units, own, norm, scaling, list(rest))


class _Pass(NamedTuple):
    """What the passes of a micro-batch leave behind: loss, weight, and sums of other numbers."""

    loss: torch.Tensor | None
    weight: int
    numbers: torch.Tensor | None


class StepTaker(Protocol):
    """What takes steps: the one after the other eagerly, or by a graph.

    Attributes:
        loss_scale: Scale of the loss; None: it is not scaled.
    """

    loss_scale: LossScale | None

    def step(self, batches: StepBatches, lr: float | torch.Tensor) -> StepResult:
        """Take one step."""


class Stepper:
    """Takes steps on one model.

    Args:
        wrapper: The model, equal on all ranks.
        objective: What is minimized.
        optimizer: SGD over the model's parameters.
        runtime: This process.
        progress: Updated at every phase.
        clip_norm: Largest L2 norm of the gradient, above 0; None does not clip.
        clip_value: Largest absolute value of an element of it, above 0; None does not clip.
        buffers: The buffers that steps change; None: there are none.
        loss_scale: Scale of the loss, for gradients of 16 bits; None: they are not scaled.

    Attributes:
        loss_scale: The same.
    """

    def __init__(  # noqa: PLR0913  # these are the parts of a step
        self,
        wrapper: DataParallelModel,
        objective: Objective,
        optimizer: SGD,
        runtime: Runtime,
        progress: ProgressTracker,
        *,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        buffers: TrainingBuffers | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        self._wrapper = wrapper
        self._objective = objective
        self._optimizer = optimizer
        self._runtime = runtime
        self._progress = progress
        self._clip_norm = clip_norm
        self._clip_value = clip_value
        self._buffers = buffers or None
        self.loss_scale = loss_scale
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._logs_numbers = bool(logged_names(objective))
        self._factors: dict[tuple[float, torch.dtype], torch.Tensor] = {}

    @property
    def momentum(self) -> float:
        """Momentum of the next step."""
        return self._optimizer.momentum

    def step(self, batches: StepBatches, lr: float | torch.Tensor) -> StepResult:
        """Take one step on the mean gradient over every unit of every rank.

        Of N units, a micro-batch of m units with mean loss L contributes L m / N to the loss whose
        gradient is taken, times what the wrapper divides its sum over ranks by: then any split
        of the samples gives the same gradient.

        Args:
            batches: This rank's part of the step.
            lr: Rate of this step, a number or a tensor on the device.
        """
        if self._buffers:
            self._prepare_buffers(self._buffers, batches.step)
        self._progress.enter(Phase.FORWARD, batches.step)
        for parameter in self._parameters:
            parameter.grad = None
        units = count_units(self._objective, batches, self._runtime)
        passes = []
        for number, batch in enumerate(batches.micro_batches):
            self._progress.touch()
            ready = batch.to(self._runtime.device)
            inputs = batches.transforms(ready.inputs, ready.indices, ready.epoch)
            with self._wrapper.sync_gradients(when=batch.is_last):
                passes.append(self._forward_backward(ready, inputs, units, number))
        self._progress.enter(Phase.ALL_REDUCE)
        gradient = self._wrapper.reduce(batches.step)
        self._progress.enter(Phase.OPTIMIZER)
        grad_norm, scaling = self._update(gradient, lr)
        if self._wrapper.averages_after(batches.step):
            self._progress.enter(Phase.AVERAGE)
            self._wrapper.average()
            if self.loss_scale:
                self.loss_scale.agree(self._runtime)
        losses = [each.loss for each in passes if each.loss is not None]
        weights = [each.weight for each in passes][: len(losses)]
        numbers = _sum_over(passes)
        return StepResult(losses, weights, units.total, units.local, grad_norm, scaling, numbers)

    def _forward_backward(
        self, batch: MicroBatch, inputs: Any, units: StepUnits, number: int
    ) -> _Pass:
        """Take a micro-batch forward and backward.

        Args:
            batch: The micro-batch, on the device.
            inputs: Its inputs after the transforms.
            units: Units of the step.
            number: Number of the micro-batch in the step.
        """
        objective, given = self._objective, units.given[number] if units.given else None
        outputs = objective.outputs(self._wrapper.forward, inputs, batch.targets)
        cut = None if given is None else CutOutputs(outputs)
        values = objective.values(outputs if cut is None else cut.outputs, batch.targets)
        if batch.is_last:
            self._progress.enter(Phase.BACKWARD)
        loss: torch.Tensor | None = values[LOSS].detach()
        weight = objective.weight(batch.samples)
        if cut is None or given is None:
            factor = weight * self._wrapper.divisor / units.total
            backward(values[LOSS], self._as_gradient(factor, values[LOSS]))
        else:
            cut.backward(
                [self._part(name, values, given, units) for name in objective.form.trained]
            )
            loss = None
            if not objective.form.sums_means:
                loss = times(values[LOSS].detach().to(given[LOSS].dtype), given[LOSS])
        numbers = None
        if self._logs_numbers:
            numbers = sum_numbers(
                objective, values, outputs, batch.targets, samples=batch.samples, units=given
            )
        return _Pass(loss, weight, numbers)

    def _part(
        self,
        name: str,
        values: Mapping[str, torch.Tensor],
        given: Mapping[str, torch.Tensor],
        units: StepUnits,
    ) -> Part:
        factor = given[name] * self._wrapper.divisor / units.totals[name]
        return Part(values[name], self._as_gradient(factor, values[name]), given[name])

    def _update(
        self, gradient: list[torch.Tensor], lr: float | torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        """Clip, then move the weights, unless the gradient is not finite; decided on the device.

        Returns:
            The norm of the gradient, and what ``StepResult.scaling`` is.
        """
        if self.loss_scale:
            self.loss_scale.unscale(gradient)
        norm = _total_norm(gradient)
        skipped = (norm - norm).nan_to_num_(nan=1.0).float()  # 0 where it is finite, else 1
        if self._clip_norm is not None:
            clip_grads_with_norm_(self._parameters, self._clip_norm, norm)
        if self._clip_value is not None and gradient:
            _clip_elements(gradient, self._clip_value)
        self._optimizer.step(lr, skipped)
        if self._buffers:
            self._buffers.restore_where(skipped)
        return norm, self.loss_scale.update(skipped) if self.loss_scale else None

    def _as_gradient(self, factor: float | torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        """Return the gradient that the backward pass begins with: the factor, and the scale.

        The same bits as from the loss times the factor, without an operation of the model's graph.
        An epoch has few factors: they are kept on the device, where a captured step reads them.
        """
        if isinstance(factor, torch.Tensor):
            gradient = factor.to(loss.dtype)
        else:
            key = (factor, loss.dtype)
            if key not in self._factors:
                self._factors[key] = torch.tensor(factor, dtype=loss.dtype, device=loss.device)
            gradient = self._factors[key]
        return gradient * self.loss_scale.scale if self.loss_scale else gradient

    def _prepare_buffers(self, buffers: TrainingBuffers, step: int) -> None:
        """Make the buffers equal on all ranks, where the weights are, and remember them."""
        if buffers.synced and self._wrapper.is_equal_before(step):
            self._progress.enter(Phase.BUFFERS, step)
            buffers.sync()
        buffers.keep()


def _sum_over(passes: list[_Pass]) -> list[torch.Tensor]:
    """Sum what is logged beside the loss over micro-batches; empty if there is nothing."""
    numbers = [each.numbers for each in passes if each.numbers is not None]
    return list(torch.stack(numbers).sum(dim=0).flatten().unbind()) if numbers else []


def _clip_elements(tensors: list[torch.Tensor], most: float) -> None:
    """Clamp every number to [-most, most], in place; of a complex one, both of its parts."""
    real = [torch.view_as_real(each) if each.is_complex() else each for each in tensors]
    torch._foreach_clamp_min_(real, -most)
    torch._foreach_clamp_max_(real, most)


def _total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of all numbers in some tensors; 0 if there are none."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(tensors)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
