"""What ranks say to each other besides gradients. With one rank, nothing is sent."""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist

from ddp_sgd.distributed.recursive_doubling import is_short, sum_by_doubling
from ddp_sgd.distributed.runtime import Runtime

T = TypeVar("T")


def sum_over_ranks(tensor: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """Replace a tensor by its sum over all ranks; every rank gets the same bits.

    Args:
        tensor: Any shape, equal on all ranks, on the runtime's device; changed in place.
        runtime: This process.

    Returns:
        The same tensor.
    """
    if runtime.alone:
        return tensor
    if is_short(tensor, runtime):
        sum_by_doubling(tensor, runtime)
    else:
        dist.all_reduce(tensor)
    return tensor


def gather_over_ranks(value: T, runtime: Runtime) -> list[T]:
    """Give every rank the values of all, in the order of ranks.

    Args:
        value: Plain data that pickles.
        runtime: This process.
    """
    if runtime.alone:
        return [value]
    values: list[T | None] = [None] * runtime.world_size
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def from_rank_0(value: T | None, runtime: Runtime) -> T:
    """Give every rank the value of rank 0.

    Args:
        value: Plain data that pickles, on rank 0; elsewhere it is not looked at.
        runtime: This process.
    """
    values = [value]
    if not runtime.alone:
        dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[return-value]


def broadcast_over_ranks(tensors: Iterable[torch.Tensor], runtime: Runtime) -> None:
    """Replace tensors by those of rank 0, in place."""
    if not runtime.alone:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)
