"""One step: the exact mean gradient over every sample of every rank, then SGD."""

from dataclasses import dataclass

import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import SGD

from ddp_sgd.data.loading import StepBatches
from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.replica import Replica
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.distributed.watch import Pulse
from ddp_sgd.losses import Objective, wide_float
from ddp_sgd.optim.sgd import set_lr


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves behind, on the device, so that nothing waits for it.

    Args:
        loss_total: Sum of the loss over this rank's units.
        units: Units of the loss over all ranks: samples, unless the loss weighs targets.
        local_units: Units of this rank.
        grad_norm: L2 norm of the whole mean gradient, before clipping; equal on all ranks.
        skipped: 1 where the gradient was not finite and the step was skipped, on all ranks; else 0.
    """

    loss_total: torch.Tensor
    units: float | torch.Tensor
    local_units: float
    grad_norm: torch.Tensor
    skipped: torch.Tensor


class Stepper:
    """Takes steps on one model.

    Args:
        replica: The model, equal on all ranks.
        objective: What is minimized.
        optimizer: SGD over the replica's parameters.
        runtime: This process.
        pulse: Is told what is being done.
        clip_norm: Largest L2 norm of the gradient, above 0; None does not clip.
    """

    def __init__(
        self,
        replica: Replica,
        objective: Objective,
        optimizer: SGD,
        runtime: Runtime,
        pulse: Pulse,
        *,
        clip_norm: float | None = None,
    ) -> None:
        self._replica = replica
        self._objective = objective
        self._optimizer = optimizer
        self._runtime = runtime
        self._pulse = pulse
        self._clip_norm = clip_norm
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self, batches: StepBatches, lr: float) -> StepResult:
        """Take one step on the mean gradient over every unit of every rank.

        The wrapper averages gradients over W ranks, so a micro-batch with loss sum S contributes S
        W / N, with N the units of the step over all ranks: then any split of the samples gives the
        same gradient.

        Args:
            batches: This rank's part of the step.
            lr: Rate of this step.
        """
        self._pulse.at("forward pass", batches.step)
        set_lr(self._optimizer, lr)
        self._optimizer.zero_grad(set_to_none=True)
        local_units, units = self._count_units(batches)
        scale = self._runtime.world_size / units
        loss_total = torch.zeros((), device=self._runtime.device)
        for batch in batches.micro_batches:
            self._pulse.tick()
            ready = batch.to(self._runtime.device)
            with self._replica.sync_gradients(when=batch.is_last):
                outputs = self._replica.forward(ready.inputs)
                total = self._objective.total(outputs, ready.targets, ready.samples)
                if batch.is_last:
                    self._pulse.at("backward pass")  # where ranks wait for each other
                torch.autograd.backward(total * scale)
            loss_total = loss_total + total.detach()
        grad_norm, skipped = self._update()
        return StepResult(loss_total, units, local_units, grad_norm, skipped)

    def _count_units(self, batches: StepBatches) -> tuple[float, float | torch.Tensor]:
        """Count the units of this rank and of all; weighed targets need one small all-reduce."""
        if self._objective.counts_samples:
            return sum(b.samples for b in batches.micro_batches), batches.samples
        own = sum(self._objective.units(b.targets, b.samples) for b in batches.micro_batches)
        device = self._runtime.device
        units = torch.tensor(own, dtype=wide_float(device), device=device)
        sum_over_ranks(units, self._runtime)
        return own, torch.where(units > 0, units, 1.0)  # none at all: the gradient is zero

    def _update(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Clip, then move the weights, unless the gradient is not finite; decided on the device."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        grad_norm = get_total_norm(gradients)
        if self._clip_norm is not None:
            clip_grads_with_norm_(self._parameters, self._clip_norm, grad_norm)
        skipped = torch.isfinite(grad_norm).logical_not().float()
        self._optimizer.found_inf = skipped  # type: ignore[attr-defined]  # read by the fused kernel
        self._optimizer.step()
        return grad_norm, skipped


def model_generators(device: torch.device) -> tuple[torch.Generator, ...]:
    """Return the generators that a model on this device draws from, such as in dropout."""
    host = torch.default_generator
    if device.type in ("cuda", "xpu"):
        return host, torch.get_device_module(device).default_generators[device.index]
    return (host,)
