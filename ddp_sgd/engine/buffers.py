"""Buffers that training changes: broadcast from rank 0 before a step, restored if it is skipped."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ddp_sgd.distributed.collectives import broadcast_over_ranks, from_rank_0
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.side_effects import Place


class TrainingBuffers:
    """Buffers that a forward pass in training mode changes, such as running statistics.

    Two promises depend on them. A step whose gradient is not finite must leave nothing behind; and
    what a forward pass reads in training (codebooks, centers, ranges of observers) must be the same
    on every rank and after a resume. So these are those of rank 0 before every step, as all buffers
    are in DistributedDataParallel. Running statistics of normalization layers are not, unless a
    forward pass in training mode reads them.

    Args:
        places: The buffers that change.
        read: Those of them that a forward pass in training mode reads.
        runtime: This process.
        resized: Those that were made or resized in use, whose shapes may differ between ranks.

    Attributes:
        synced: Whether there are buffers that must be the same on every rank before a step.
    """

    def __init__(
        self,
        places: Sequence[Place],
        read: Sequence[Place],
        runtime: Runtime,
        resized: Sequence[Place] = (),
    ) -> None:
        self._places = list(places)
        self._read = [place for place in read if place not in resized]
        self._resized = [place for place in read if place in resized]
        self._runtime = runtime
        self._before: list[torch.Tensor | None] = []
        self._copies: list[torch.Tensor | None] = []
        self._pointers: list[int] = []
        self.synced = bool(read) and not runtime.alone

    def __bool__(self) -> bool:
        return bool(self._places)

    def __contains__(self, place: Place) -> bool:
        return place in self._places

    def sync(self) -> None:
        """Replace the buffers that training reads by those of rank 0."""
        if not self.synced:
            return
        buffers = map(tensor_at, self._read)
        broadcast_over_ranks((b.detach() for b in buffers if b is not None), self._runtime)
        if self._resized:
            mine = [None if (b := tensor_at(place)) is None else b.cpu() for place in self._resized]
            device = self._runtime.device
            for place, value in zip(self._resized, from_rank_0(mine, self._runtime), strict=True):
                put_at(place, None if value is None else value.to(device))

    def keep(self) -> None:
        """Remember the values before a step."""
        self._before = [tensor_at(place) for place in self._places]
        self._pointers = _pointers(self._before)
        if _are_alike(self._before, self._copies):
            for _, copies, values in _by_kind(self._copies, self._before):
                torch._foreach_copy_(copies, [tensor.detach() for tensor in values])
        else:
            self._copies = [None if t is None else t.detach().clone() for t in self._before]

    def restore(self) -> None:
        """Put the remembered values back."""
        for number, copy in enumerate(self._copies):
            self._put(number, copy)

    def restore_where(self, skipped: torch.Tensor) -> None:
        """Put the remembered values back if the step was skipped; nothing waits to find out.

        Args:
            skipped: Tensor without dimensions, on the device of the buffers; 1 if it was, else 0.
        """
        now = [tensor_at(place) for place in self._places]
        if not _are_alike(now, self._copies):
            if bool(skipped):  # waits for the device, in a step that made memory anyway
                self.restore()
            return
        is_skipped = skipped.bool()
        for chosen, kept, new in _by_kind(self._copies, now):
            flat = torch.where(is_skipped.to(new[0].device), _flat(kept), _flat(new))
            parts = torch.split(flat, [tensor.numel() for tensor in new])
            values = [part.view(t.shape) for part, t in zip(parts, new, strict=True)]
            self._write(dict(zip(chosen, values, strict=True)), new)

    def _write(self, values: dict[int, torch.Tensor], now: list[torch.Tensor]) -> None:
        """Write in place, but for buffers that were given other memory, perhaps that of others."""
        written, with_values = [], []
        for (number, value), tensor, pointer in zip(
            values.items(), now, _pointers(now), strict=True
        ):
            if tensor is not self._before[number]:
                put_at(self._places[number], value.clone())
            elif pointer != self._pointers[number]:
                tensor.data = value.clone()
            else:
                written.append(tensor.detach())
                with_values.append(value)
        if written:
            torch._foreach_copy_(written, with_values)

    def _put(self, number: int, value: torch.Tensor | None) -> None:
        """Put a value back into the tensor that held it."""
        before = self._before[number]
        if before is not None and value is not None:
            before.data = value.clone()
        put_at(self._places[number], before)


def buffers_by_name(modules: Mapping[str, nn.Module], *, unset: bool = False) -> dict[str, Place]:
    """List all buffers of some modules by their full names; a shared one has its first name.

    Args:
        modules: Modules with all that is below them, by the beginning of the names; may be empty.
        unset: List those instead that are registered as None until a forward pass makes them.
    """
    found: dict[Place, str] = {}
    for where, root in modules.items():
        for path, module in root.named_modules():
            for name, buffer in module._buffers.items():
                if (buffer is None) == unset:
                    found.setdefault((module, name), ".".join(filter(None, (where, path, name))))
    return {name: place for place, name in found.items()}


def buffer_at(place: Place) -> torch.Tensor:
    """Return a buffer that is not None; ``get_buffer`` fails for scripted modules."""
    buffer = tensor_at(place)
    if buffer is None:
        raise RuntimeError(f"the buffer {place[1]} of {type(place[0]).__name__} is not set")
    return buffer


def is_saved(place: Place) -> bool:
    """Whether a buffer belongs to the ``state_dict`` of its module."""
    module, name = place
    return name not in module._non_persistent_buffers_set


def statistics_of(modules: Iterable[nn.Module]) -> list[Place]:
    """List the running statistics of all normalization layers.

    Args:
        modules: Modules with all that is below them.
    """
    return [
        (module, name)
        for root in modules
        for module in root.modules()
        if isinstance(module, _NormBase)
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def tensor_at(place: Place) -> torch.Tensor | None:
    """Return the buffer or parameter at a place; None if there is none."""
    module, name = place
    for held in (module._buffers, module._parameters):  # scripted modules have no get()
        if name in held:
            return held[name]
    return None


def put_at(place: Place, value: torch.Tensor | None) -> None:
    """Put a buffer or a parameter at a place, which keeps its kind."""
    module, name = place
    if name not in module._parameters:
        module._buffers[name] = value
    elif value is None or isinstance(value, nn.Parameter):
        module._parameters[name] = value
    else:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)


def _are_alike(some: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None]) -> bool:
    """Whether tensors have equal shapes, types and devices, so that one call can copy all."""
    return [_form(tensor) for tensor in some] == [_form(tensor) for tensor in others] and all(
        tensor is None or tensor.layout is torch.strided for tensor in some
    )


def _form(tensor: torch.Tensor | None) -> tuple[Any, ...]:
    return () if tensor is None else (tensor.shape, tensor.dtype, tensor.device)


def _pointers(tensors: Iterable[torch.Tensor | None]) -> list[int]:
    return [t.data_ptr() if t is not None and t.layout is torch.strided else 0 for t in tensors]


def _by_kind(
    some: Sequence[torch.Tensor | None], others: Sequence[torch.Tensor | None]
) -> Iterator[tuple[list[int], list[torch.Tensor], list[torch.Tensor]]]:
    """Group pairs of tensors by type and device: one call copies the tensors of one kind only.

    Yields:
        Numbers of the pairs of one kind, their first tensors and their second ones.
    """
    kinds: dict[Any, list[tuple[int, torch.Tensor, torch.Tensor]]] = {}
    for number, (one, other) in enumerate(zip(some, others, strict=True)):
        if one is not None and other is not None:
            kinds.setdefault((other.dtype, other.device), []).append((number, one, other))
    for found in kinds.values():
        numbers, ones, them = zip(*found, strict=True)
        yield list(numbers), list(ones), list(them)


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
