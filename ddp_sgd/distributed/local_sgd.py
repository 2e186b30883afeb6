"""Post-local SGD: ranks take steps of their own, and average their weights now and then."""

from collections.abc import Mapping

import torch
from torch import nn

from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.data_parallel import FlatAllReduce
from ddp_sgd.distributed.progress import Phase
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.plan import Plan


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
