"""All-reduce of small tensors by recursive doubling, in fewer exchanges than gloo's ring."""

import torch
import torch.distributed as dist

from ddp_sgd.distributed.runtime import Runtime

MOST_BYTES = 2**19
"""Larger tensors are left to gloo, which sends fewer bytes: of W ranks each sends 2 (W - 1) / W
times the tensor around a ring, here log2 W times."""


def is_short(tensor: torch.Tensor, runtime: Runtime) -> bool:
    """Whether what a sum takes is waiting rather than sending, on gloo; the same on all ranks.

    Args:
        tensor: Any shape, equal on all ranks.
        runtime: This process, one of several.
    """
    on_gloo = runtime.backend == "gloo" and tensor.device.type == "cpu"
    return on_gloo and 0 < tensor.nbytes <= MOST_BYTES


def sum_by_doubling(tensor: torch.Tensor, runtime: Runtime) -> None:
    """Replace a tensor by its sum over all ranks; every rank gets the same bits.

    In round k ranks that differ in bit k of their number swap what they have, and add: after
    log2 W rounds each has the sum of all. The ring of gloo's all-reduce takes 2 (W - 1) waits one
    after the other. Ranks beyond the largest power of two have one of the others add theirs.

    Args:
        tensor: Contiguous, on the host; equal in shape on all ranks, changed in place.
        runtime: This process, one of several.

    Source:
        Thakur, Rabenseifner, Gropp 2005, "Optimization of Collective Communication Operations in
        MPICH", section 4.5.
    """
    rank = runtime.rank
    received = torch.empty_like(tensor)
    paired = 1 << (runtime.world_size.bit_length() - 1)
    if rank >= paired:
        dist.send(tensor, rank - paired)
        dist.recv(tensor, rank - paired)
        return
    has_follower = rank + paired < runtime.world_size
    if has_follower:
        dist.recv(received, rank + paired)
        tensor.add_(received)
    for bit in range(paired.bit_length() - 1):
        _swap(tensor, received, rank ^ 1 << bit)
        tensor.add_(received)
    if has_follower:
        dist.send(tensor, rank + paired)


def _swap(mine: torch.Tensor, theirs: torch.Tensor, partner: int) -> None:
    """Send a tensor while another one comes."""
    coming, going = dist.irecv(theirs, partner), dist.isend(mine, partner)
    for work in filter(None, (coming, going)):  # None is for processes outside the group
        work.wait()
