"""One step: the exact mean gradient over every sample of every rank, then SGD."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch.nn.utils import clip_grads_with_norm_

from ddp_sgd.data.device import move
from ddp_sgd.data.loader import StepBatches
from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.data_parallel import DataParallelModel
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import TrainingBuffers
from ddp_sgd.engine.precision import LossScale
from ddp_sgd.losses import Objective, counts_on_host, wide_float
from ddp_sgd.optim.sgd import SGD


@dataclass(slots=True)
class StepResult:
    """What a step leaves behind, on the device, so that nothing waits for it.

    Args:
        losses: Mean loss of each micro-batch of this rank.
        weights: Units in each of them; the sum of losses by weights is this rank's loss.
        units: Units of the loss over all ranks: samples, unless the loss weighs targets.
        local_units: Units of this rank; on the device if they were counted there.
        grad_norm: L2 norm of the whole mean gradient, before clipping; equal on all ranks. Where it
            is not finite the step was skipped, on all ranks.
        scaling: With a loss scale, that of the step, and the overflows of the run so far.
    """

    losses: list[torch.Tensor]
    weights: list[int]
    units: float | torch.Tensor
    local_units: float | torch.Tensor
    grad_norm: torch.Tensor
    scaling: tuple[torch.Tensor, torch.Tensor] | None = None

    def tensors(self) -> list[torch.Tensor]:
        """List what is still on the device: losses, units if they are, norm and scaling."""
        units = (self.units, self.local_units)
        counted = [each for each in units if isinstance(each, torch.Tensor)]
        return [*self.losses, *counted, self.grad_norm, *(self.scaling or ())]

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
        return StepResult(losses, self.weights, units, own, norm, scaling)


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
        buffers: TrainingBuffers | None = None,
        loss_scale: LossScale | None = None,
    ) -> None:
        self._wrapper = wrapper
        self._objective = objective
        self._optimizer = optimizer
        self._runtime = runtime
        self._progress = progress
        self._clip_norm = clip_norm
        self._buffers = buffers or None
        self.loss_scale = loss_scale
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
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
        local_units, units = self._count_units(batches)
        divisor = self._wrapper.divisor
        losses, weights = [], []
        for batch in batches.micro_batches:
            self._progress.touch()
            ready = batch.to(self._runtime.device)
            inputs = batches.transforms(ready.inputs, ready.indices, ready.epoch)
            with self._wrapper.sync_gradients(when=batch.is_last):
                outputs = self._objective.outputs(self._wrapper.forward, inputs)
                loss = self._objective(outputs, ready.targets)
                weight = self._objective.weight(ready.samples)
                if batch.is_last:
                    self._progress.enter(Phase.BACKWARD)
                backward(loss, self._as_gradient(weight * divisor / units, loss))
            losses.append(loss.detach())
            weights.append(weight)
        self._progress.enter(Phase.ALL_REDUCE)
        gradient = self._wrapper.reduce(batches.step)
        self._progress.enter(Phase.OPTIMIZER)
        grad_norm, scaling = self._update(gradient, lr)
        if self._wrapper.averages_after(batches.step):
            self._progress.enter(Phase.AVERAGE)
            self._wrapper.average()
            if self.loss_scale:
                self.loss_scale.agree(self._runtime)
        return StepResult(losses, weights, units, local_units, grad_norm, scaling)

    def _count_units(
        self, batches: StepBatches
    ) -> tuple[float | torch.Tensor, float | torch.Tensor]:
        """Count the units of this rank and of all; weighed targets need one small all-reduce."""
        if self._objective.counts_samples:
            return sum([b.samples for b in batches.micro_batches]), batches.samples
        own: float | torch.Tensor
        device, objective = self._runtime.device, self._objective
        if counts_on_host(device):
            own = sum(objective.units(b.targets, b.samples) for b in batches.micro_batches)
            if self._runtime.alone:  # a number costs less than a tensor, in a step of small layers
                return own, own if own > 0 else 1.0
            units = torch.tensor(own, dtype=wide_float(device))
        else:
            pairs = [(move(b.targets, device), b.samples) for b in batches.micro_batches]
            own = torch.stack([objective.units_on_device(*pair) for pair in pairs]).sum()
            units = own.clone()
        sum_over_ranks(units, self._runtime)
        # None at all: the gradient is zero. A number in place of the ones would be sent each time.
        return own, torch.where(units > 0, units, torch.ones_like(units))

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


def backward(loss: torch.Tensor, gradient: torch.Tensor) -> None:
    """Add the gradient of ``loss * gradient`` to that of each parameter.

    Args:
        loss: Tensor without dimensions.
        gradient: The same, on the same device.

    What ``loss.backward(gradient)`` comes to. That imports sympy for a look at the shape, half a
    second in the first step, and takes 18 us more in every step. ``(loss * factor).backward()``
    gives the same bits without sympy, but makes forward and backward pass of the digits MLP a
    quarter slower.
    """
    keep_graph = create_graph = False
    torch.autograd.Variable._execution_engine.run_backward(
        *((loss,), (gradient,), keep_graph, create_graph, ()),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def _total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norm of all numbers in some tensors; 0 if there are none."""
    if not tensors:
        return torch.zeros(())
    norms = torch._foreach_norm(tensors)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
