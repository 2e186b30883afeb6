"""Batch normalization: whether every step of a run has the samples that it needs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddp_sgd.errors import ConfigError
from ddp_sgd.plan import Plan, micro_batch_sizes

_NOT_SYNCHRONIZED = ("cpu", "mps")
"""Types of devices on which torch's SyncBatchNorm raises."""


class _StepKind(NamedTuple):
    """Steps of one size.

    Args:
        name: For the message.
        samples: Samples of all ranks in such a step, at least 1.
        remedy: What makes it larger.
    """

    name: str
    samples: int
    remedy: str


def check_normalization(
    model: nn.Module, plan: Plan, *, step: int, skip: int, device: torch.device
) -> None:
    """Refuse a run in a step of which batch normalization would fail, or wait for ever.

    A layer that is frozen in evaluation mode, with running statistics, needs nothing. Any other
    needs two samples in each forward pass of a rank: torch requires two values of a channel, and a
    layer on images would take one sample, but its statistics would be those of that image.
    SyncBatchNorm reduces over ranks in each forward pass; all need equal numbers of passes.

    Args:
        model: In the modes in which it is trained.
        plan: The run's arithmetic.
        step: Number of the next step.
        skip: Samples at the head of that step that were trained already.
        device: Where this rank computes.

    Raises:
        ConfigError: A forward pass of a rank has fewer than two samples; or ranks that normalize
            together have different numbers of passes, or a device on which they cannot.
    """
    synchronized, separate = _layers(model, plan.world_size)
    if synchronized and device.type in _NOT_SYNCHRONIZED:
        raise ConfigError(
            f"runtime.device is {device.type} with world size {plan.world_size}, while torch has "
            f"the SyncBatchNorm of {type(model).__name__} on GPUs only; use BatchNorm, or GPUs."
        )
    for kind in _step_kinds(plan, step, skip):
        most, fewest = _sizes_at_the_ends(plan, kind.samples)
        where = f"data.batch_size is {plan.batch_size} with world size {plan.world_size}, so that "
        smallest = min(*most, *(fewest or (0,)))
        if separate and smallest < 2:
            raise ConfigError(
                f"{where}a forward pass in {kind.name} has as few samples as {smallest}, too few "
                f"for the batch normalization of {type(model).__name__}; {kind.remedy}."
            )
        if synchronized and len(most) != len(fewest):
            raise ConfigError(
                f"{where}in {kind.name} some ranks have {len(most)} forward passes and others "
                f"{len(fewest)}, which the synchronized batch normalization of "
                f"{type(model).__name__} would wait for; {kind.remedy}."
            )


def _layers(model: nn.Module, world_size: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """List the layers that use statistics of a batch: those over all ranks, and the others."""
    layers: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]
    synchronized: list[nn.Module] = [
        layer
        for layer in layers
        if isinstance(layer, nn.SyncBatchNorm) and layer.training and world_size > 1
    ]
    return synchronized, [layer for layer in layers if layer not in synchronized]


def _step_kinds(plan: Plan, step: int, skip: int) -> Iterator[_StepKind]:
    """Yield a step of each size that the run takes."""
    earlier = "go on with the data.batch_size and the number of ranks of the checkpoint"
    resumed = step > 0 or skip > 0
    if plan.samples_per_epoch >= plan.global_batch:
        larger = "set data.batch_size to at least 2"
        yield _StepKind("a full step", plan.global_batch, earlier if resumed else larger)
    if plan.last_batch < plan.global_batch:
        # Without the tail of an epoch of one step there would be no step.
        drop = "set data.tail=drop, or " if plan.steps_per_epoch > 1 else "set "
        other = f"{drop}another data.batch_size of at least 2"
        yield _StepKind("the last step of an epoch", plan.last_batch, earlier if resumed else other)
    if skip:
        yield _StepKind(
            "the first step after the resume",
            plan.step_samples(step) - skip,
            f"{earlier} until the end of the epoch",
        )


def _sizes_at_the_ends(plan: Plan, samples: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the micro-batches of the ranks with the most and with the fewest samples."""
    first, last = (
        micro_batch_sizes(samples, rank, plan.world_size, plan.batch_size)
        for rank in (0, plan.world_size - 1)
    )
    return first, last
