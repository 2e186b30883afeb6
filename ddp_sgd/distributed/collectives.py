"""Collectives: all-reduce, gather and broadcast over ranks. With one rank, nothing is sent.

All-reduce of small tensors by recursive doubling, in fewer exchanges than gloo's ring.

Broadcast of parameters and buffers from rank 0.
"""

from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.tree import bytes_of

T = TypeVar("T")

_PACKED_BYTES = 2**20
"""Tensors that are sent together; a message takes as long as some 100 kB of it."""


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
    numbers = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    if is_short(numbers, runtime):
        sum_by_doubling(numbers, runtime)
    else:
        dist.all_reduce(numbers)
    return tensor


def at_own_rank(value: float, runtime: Runtime) -> list[float]:
    """Put a number at this rank's place among zeros: the sum over ranks lists those of all."""
    numbers = [0.0] * runtime.world_size
    numbers[runtime.rank] = value
    return numbers


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
    """Replace tensors by those of rank 0, in place.

    Args:
        tensors: Of any dtype and memory layout, expanded and sparse ones included; equal in shape
            on all ranks, and without gradients.
        runtime: This process.
    """
    if runtime.alone:
        return
    packed, size = list[torch.Tensor](), 0
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            tensor.copy_(from_rank_0(tensor, runtime))
        elif tensor.numel():
            packed.append(_without_repeats(tensor))
            size += packed[-1].nbytes
            if size > _PACKED_BYTES:
                _broadcast_bytes(packed)
                packed, size = [], 0
    if packed:
        _broadcast_bytes(packed)


def _broadcast_bytes(tensors: list[torch.Tensor]) -> None:
    """Broadcast as bytes: backends lack number types, and send memory without regard to strides.

    A large tensor comes alone, several small ones in one message.
    """
    contents = [bytes_of(tensor) for tensor in tensors]
    message = contents[0] if len(contents) == 1 else torch.cat(contents)
    dist.broadcast(message, src=0)
    if len(tensors) == 1 and message.data_ptr() == tensors[0].data_ptr():
        return
    sizes = [len(content) for content in contents]
    for tensor, content in zip(tensors, torch.split(message, sizes), strict=True):
        # A copy begins where memory is aligned, as a view of another type has to.
        tensor.copy_(content.clone().view(tensor.dtype).view(tensor.shape))


def _without_repeats(tensor: torch.Tensor) -> torch.Tensor:
    """Keep one element of each that an expanded tensor repeats: only that one can be written."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


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


def broadcast_parameters(model: nn.Module, runtime: Runtime) -> None:
    """Replace the parameters by those of rank 0; they are equal in shape on all ranks."""
    broadcast_over_ranks((p.detach() for p in model.parameters()), runtime)


def broadcast_buffers(model: nn.Module, runtime: Runtime) -> None:
    """Replace the buffers by those of rank 0.

    Buffers may be made or resized in a forward pass, such as caches for the longest sequence so
    far: these are sent whole where ranks differ in type or shape.

    Args:
        model: The model, on the runtime's device; all ranks call this with the same modules.
        runtime: This process.
    """
    if runtime.alone:
        return
    places = _places(model)
    forms = gather_over_ranks({name: _form(*place) for name, place in places.items()}, runtime)
    alike = [name for name, form in forms[0].items() if all(f.get(name) == form for f in forms)]
    values = [places[name][0]._buffers[places[name][1]] for name in alike]
    broadcast_over_ranks((value.detach() for value in values if value is not None), runtime)
    if all(form == forms[0] for form in forms):
        return
    others = {name: _content(*place) for name, place in places.items() if name not in alike}
    modules = dict(model.named_modules())
    for name, (value, is_saved) in from_rank_0(others, runtime).items():
        path, _, own = name.rpartition(".")
        here = None if value is None else value.to(runtime.device)
        modules[path].register_buffer(own, here, persistent=is_saved)


def _places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """List the buffers by their full names, also those that are None."""
    return {
        f"{path}.{own}": (module, own)
        for path, module in model.named_modules()
        for own in module._buffers.keys()  # noqa: SIM118  # scripted modules have no iterator
    }


def _form(module: nn.Module, own: str) -> tuple[str, ...]:
    buffer = module._buffers[own]
    if buffer is None:
        return ()
    return str(buffer.dtype), str(tuple(buffer.shape)), str(buffer.layout)


def _content(module: nn.Module, own: str) -> tuple[torch.Tensor | None, bool]:
    """Return a buffer on the host, and whether it belongs to the ``state_dict``."""
    buffer = module._buffers[own]
    is_saved = own not in module._non_persistent_buffers_set
    return None if buffer is None else buffer.detach().cpu(), is_saved
