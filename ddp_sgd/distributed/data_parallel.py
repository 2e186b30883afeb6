"""Data-parallel models: flat all-reduce, DistributedDataParallel, post-local SGD, and which one.

Only this file names DistributedDataParallel, and fixes its bucket layout before the first step.
"""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_sgd.config.schema import ParallelConfig
from ddp_sgd.distributed.collectives import broadcast_buffers, broadcast_parameters, sum_over_ranks
from ddp_sgd.distributed.comm_hooks import CommHook, build_comm_hook
from ddp_sgd.distributed.progress import Phase
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import unused_parameters
from ddp_sgd.plan import Plan

# Rank 0's buffers are what counts in the end, and normalization layers do not read them in
# training: they are sent when they are read, not at every step. The argument was renamed between
# releases of torch.
_NO_BUFFERS_IN_FORWARD: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


class DataParallelModel:
    """A model whose gradients are summed over ranks; this one is alone, and adds nothing.

    Args:
        model: The model, on the runtime's device.
        runtime: This process.

    Attributes:
        inner: The model as the user built it; evaluation calls this one, since a forward pass of a
            wrapper may communicate.
        forward: What a training step calls.
        divisor: What the wrapper divides the sum over ranks by.
        meets_in: Phases of a step in which ranks wait for each other.
    """

    meets_in: tuple[Phase, ...] = ()

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        self.inner = model
        self.forward: nn.Module = model
        self.divisor = 1
        self._runtime = runtime
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def sync_gradients(self, *, when: bool) -> AbstractContextManager[None]:  # noqa: ARG002
        """Reduce gradients over ranks in the backward pass, or let them add up locally.

        Args:
            when: True in the last micro-batch of a step.
        """
        return nullcontext()

    def reduce(self, step: int) -> list[torch.Tensor]:  # noqa: ARG002
        """Finish the reduction after the last backward pass of a step.

        Args:
            step: Number of the step in the run, from 0.

        Returns:
            The whole gradient in as few tensors as there are; each parameter has its part in
            ``grad``.
        """
        return [p.grad for p in self._parameters if p.grad is not None]

    def is_equal_before(self, step: int) -> bool:  # noqa: ARG002
        """Whether all ranks have the same weights before this step."""
        return True

    def averages_after(self, step: int) -> bool:  # noqa: ARG002
        """Whether ranks average their weights after this step, since these differ."""
        return False

    def average(self) -> None:
        """Replace weights that differ between ranks by their mean; here they never do."""

    def sync_buffers(self) -> None:
        """Replace the buffers, such as running statistics, by those of rank 0."""
        broadcast_buffers(self.inner, self._runtime)

    def state_dict(self) -> Mapping[str, Any]:
        """Gather what a resume needs besides weights; all ranks call this after the same step.

        Returns:
            Tensors and plain data, on rank 0; often empty, elsewhere always.
        """
        return {}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Put back what ``memory`` gave; all ranks call this before the first step.

        Args:
            saved: Content of the checkpoint, on rank 0, None if it has none; elsewhere it is not
                looked at.
        """


class FlatAllReduce(DataParallelModel):
    """Gradients are gathered in one buffer for each type, which is summed over ranks in one call.

    Where all gradients fit into one bucket there is nothing that a wrapper could overlap with the
    backward pass. Norm and check take one call, too, so that this is quicker on one rank as well.
    Weights and buffers become rank 0's.
    """

    meets_in: tuple[Phase, ...] = (Phase.ALL_REDUCE,)

    def __init__(self, model: nn.Module, runtime: Runtime) -> None:
        super().__init__(model, runtime)
        broadcast_parameters(model, runtime)
        self.sync_buffers()
        self._buffers: list[torch.Tensor] = []
        self._views: list[torch.Tensor] = []
        self._parameters.sort(key=lambda p: str(p.dtype))  # stable: in the order of the model
        for _, group in groupby(self._parameters, key=lambda p: p.dtype):
            members = list(group)
            sizes = [p.numel() for p in members]
            buffer = torch.zeros(sum(sizes), dtype=members[0].dtype, device=runtime.device)
            self._buffers.append(torch.view_as_real(buffer) if buffer.is_complex() else buffer)
            # A view has the strides of its parameter: the fused kernel walks memory in order.
            self._views += [
                part.as_strided(p.shape, p.stride())
                for part, p in zip(torch.split(buffer, sizes), members, strict=True)
            ]

    def reduce(self, step: int) -> list[torch.Tensor]:  # noqa: ARG002
        """Gather the gradients of this rank, and sum them over ranks.

        Raises:
            ConfigError: A parameter has no gradient, on one of several ranks.
        """
        return [sum_over_ranks(part, self._runtime) for part in self._gather()]

    def _gather(self) -> list[torch.Tensor]:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if len(gradients) < len(self._views):
            if self._runtime.alone:
                return gradients
            raise unused_parameters()
        torch._foreach_copy_(self._views, gradients)
        for p, view in zip(self._parameters, self._views, strict=True):
            p.grad = view
        return self._buffers


class WrappedDDP(DataParallelModel):
    """A model in DistributedDataParallel, which reduces buckets while the backward pass goes on.

    Weights and buffers become rank 0's.

    Args:
        model: The model, on the runtime's device.
        runtime: This process.
        hook: Takes the place of the all-reduce; None: gradients are reduced as they are.
        options: Arguments of the wrapper.
    """

    meets_in = (Phase.BACKWARD,)

    def __init__(
        self, model: nn.Module, runtime: Runtime, hook: CommHook | None = None, **options: Any
    ) -> None:
        super().__init__(model, runtime)
        self._hook = hook
        broadcast_parameters(model, runtime)
        self._ddp = DistributedDataParallel(
            model,
            device_ids=None if runtime.device.type == "cpu" else [runtime.device],
            init_sync=False,  # its own broadcast fails on expanded buffers and rare dtypes
            **_NO_BUFFERS_IN_FORWARD,
            **options,
        )
        self.forward = self._ddp
        self.divisor = runtime.world_size
        self.sync_buffers()
        if hook:
            self._ddp.register_comm_hook(None, hook.reduce)
        if not options.get("static_graph") and not options.get("find_unused_parameters"):
            settle_buckets(self._ddp)

    def sync_gradients(self, *, when: bool) -> AbstractContextManager[None]:
        """Reduce gradients over ranks in the backward pass, or let them add up locally."""
        return nullcontext() if when else self._ddp.no_sync()

    def state_dict(self) -> Mapping[str, Any]:
        """Gather what the hook has to remember."""
        return self._hook.state_dict() if self._hook else {}

    def load_state_dict(self, saved: Mapping[str, Any] | None) -> None:
        """Put back what the hook has to remember."""
        if self._hook:
            self._hook.load_state_dict(saved)


def settle_buckets(ddp: DistributedDataParallel) -> None:
    """Let the wrapper lay out its buckets now, in the reverse order of the model's parameters.

    Otherwise the first step after a start has all gradients in one bucket, and later ones have them
    in the order in which the first backward pass came to them. Sums over more than two ranks differ
    in the last bits with the place in a bucket, and so would a run that was stopped and resumed;
    and what a hook keeps for each bucket would be lost.

    Every rank calls this. The wrapper's hook is called in two passes, in the second with the
    buckets of all steps to come. The model itself is not called.

    Args:
        ddp: The wrapper; not with ``static_graph``, which would take this for the graph, nor with
            ``find_unused_parameters``, where buckets stay as they are at first.
    """
    model, parameters = ddp.module, [p for p in ddp.parameters() if p.requires_grad]
    ddp.module = _Touch(parameters)
    try:
        for _ in range(2):  # the second forward pass lays out, after the order of the first one
            torch.autograd.backward(ddp(torch.zeros((), device=parameters[0].device)))
    finally:
        ddp.module = model
    for parameter in parameters:
        parameter.grad = None


class _Touch(nn.Module):
    """Adds up all parameters: the backward pass comes to them from the last to the first."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self._touched = parameters

    def forward(self, total: torch.Tensor) -> torch.Tensor:
        for parameter in self._touched:
            total = total + parameter.sum().real.to(total.dtype)
        return total


class LocalSGD(FlatAllReduce):
    """A model that differs between ranks from one average to the next.

    Up to ``plan.local_start`` gradients are summed at every step. Afterwards each rank follows the
    gradient of its own samples, scaled by the number of ranks; weights and momentum buffers become
    their mean over ranks wherever ``plan.ranks_sync_at`` is true; with a period of one step this is
    plain SGD. Ranks are equal after an average: there, and only there, the state is saved.

    Args:
        model: The model, on the runtime's device.
        runtime: This process.
        plan: The run's arithmetic.
        momentum_buffers: Of each parameter; empty without momentum.

    Source:
        Lin et al. 2020, "Don't Use Large Mini-Batches, Use Local SGD", arXiv:1808.07217. There
        momentum buffers stay apart; here they are averaged, too, so that one checkpoint is enough.
    """

    meets_in = (Phase.ALL_REDUCE, Phase.AVERAGE)

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        plan: Plan,
        momentum_buffers: Mapping[nn.Parameter, torch.Tensor],
    ) -> None:
        super().__init__(model, runtime)
        self.divisor = runtime.world_size
        self._plan = plan
        self._momentum_buffers = momentum_buffers

    def reduce(self, step: int) -> list[torch.Tensor]:
        """Gather the gradients; at the steps that are common to all ranks, average them."""
        if self._plan.is_local(step):
            return self._gather()
        return [buffer.div_(self.divisor) for buffer in super().reduce(step)]

    def is_equal_before(self, step: int) -> bool:
        """Whether all ranks have the same weights before this step."""
        return self._plan.ranks_sync_at(step)

    def averages_after(self, step: int) -> bool:
        """Whether ranks average their weights after this step."""
        return self._plan.is_local(step) and self._plan.ranks_sync_at(step + 1)

    def average(self) -> None:
        """Replace weights and momentum buffers by their mean over ranks, one call for each type."""
        # Looked up at every average, since a model may replace the storage of its parameters.
        averaged = [p.detach() for p in self._parameters]
        averaged += [self._momentum_buffers[p] for p in self._parameters if self._momentum_buffers]
        by_type: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in averaged:
            by_type.setdefault(tensor.dtype, []).append(tensor)
        for tensors in by_type.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            sum_over_ranks(flat, self._runtime).div_(self.divisor)
            parts = torch.split(flat, [tensor.numel() for tensor in tensors])
            views = [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
            torch._foreach_copy_(tensors, views)


def wrap_model(
    model: nn.Module,
    runtime: Runtime,
    config: ParallelConfig,
    plan: Plan,
    momentum_buffers: Mapping[nn.Parameter, torch.Tensor],
    *,
    captured: bool = False,
) -> DataParallelModel:
    """Keep a model equal on all ranks, in the way that costs least.

    With ``parallel.replica: auto`` gradients that fit into one bucket are reduced by one call after
    the backward pass. Larger ones, and what only DistributedDataParallel can do, are reduced by
    that, or, on one rank, left as they are. One rank has no other to send compressed gradients to.

    Args:
        model: The model, on the runtime's device; its weights become rank 0's.
        runtime: This process.
        config: Section ``parallel`` of the configuration.
        plan: The run's arithmetic.
        momentum_buffers: Of each parameter; empty without momentum.
        captured: Whether steps are captured, which buckets of several ranks cannot be.

    Raises:
        ConfigError: The model's gradients cannot be compressed.
    """
    if plan.local_start is not None:
        return LocalSGD(model, runtime, plan, momentum_buffers)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    compresses = config.compression != "none" and not runtime.alone
    only_ddp = config.static_graph or config.find_unused_parameters or compresses
    fits = trained <= config.bucket_mb * 2**20 and not only_ddp
    is_flat = config.replica == "flat" or (captured and not runtime.alone)
    if is_flat or (config.replica == "auto" and fits):
        return FlatAllReduce(model, runtime)
    if runtime.alone:
        return DataParallelModel(model, runtime)
    return WrappedDDP(
        model,
        runtime,
        build_comm_hook(config.compression, model, runtime),
        bucket_cap_mb=config.bucket_mb,
        gradient_as_bucket_view=config.gradient_as_bucket_view,
        static_graph=config.static_graph,
        find_unused_parameters=config.find_unused_parameters,
    )
