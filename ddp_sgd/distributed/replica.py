"""One model on every rank, kept equal; the only file that names DistributedDataParallel."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_sgd.distributed.collectives import broadcast_over_ranks
from ddp_sgd.distributed.runtime import Runtime

# Rank 0's buffers are what counts in the end, and normalization layers do not read them in
# training: they are sent when somebody looks, not at every step. The argument was renamed between
# releases of torch.
_NO_BUFFERS_IN_FORWARD: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


class Replica:
    """A model whose gradients are the mean over all ranks. Alone, it is the model and nothing else.

    Args:
        model: The model, on the runtime's device; its weights become rank 0's.
        runtime: This process.
        bucket_mb: Size of the pieces in which gradients are reduced, in MiB.
        gradient_as_bucket_view: Let gradients live in the reduced buffers.
        static_graph: Promise that every step uses the same parameters in the same order.
        find_unused_parameters: Search each step for parameters that got no gradient.

    Attributes:
        inner: The model as the user built it; evaluation calls this one, since a forward pass of
            the wrapper may talk to the other ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        runtime: Runtime,
        *,
        bucket_mb: float = 25.0,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
        find_unused_parameters: bool = False,
    ) -> None:
        self.inner = model
        self._runtime = runtime
        self._ddp = (
            None
            if runtime.alone
            else DistributedDataParallel(
                model,
                device_ids=None if runtime.device.type == "cpu" else [runtime.device],
                **_NO_BUFFERS_IN_FORWARD,
                bucket_cap_mb=bucket_mb,
                gradient_as_bucket_view=gradient_as_bucket_view,
                static_graph=static_graph,
                find_unused_parameters=find_unused_parameters,
            )
        )
        self.forward: nn.Module = self._ddp or model
        self.sync_buffers()

    def sync_gradients(self, *, when: bool) -> AbstractContextManager[None]:
        """Reduce gradients over ranks in the backward pass, or let them add up locally.

        Args:
            when: True in the last micro-batch of a step.
        """
        if self._ddp is None or when:
            return nullcontext()
        return self._ddp.no_sync()

    def sync_buffers(self) -> None:
        """Replace the buffers, such as running statistics, by those of rank 0."""
        broadcast_over_ranks(self.inner.buffers(), self._runtime)
