"""Bucket layout of DistributedDataParallel, fixed before the first step."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


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
