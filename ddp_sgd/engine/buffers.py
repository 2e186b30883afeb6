"""Buffers that training changes: broadcast from rank 0 before a step, restored if it is skipped."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ddp_sgd.distributed.collectives import broadcast_over_ranks
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

    Attributes:
        synced: Whether there are buffers that must be the same on every rank before a step.
    """

    def __init__(self, places: Sequence[Place], read: Sequence[Place], runtime: Runtime) -> None:
        self._places = list(places)
        self._read = list(read)
        self._runtime = runtime
        self._before: list[torch.Tensor] = []
        self._copies: list[torch.Tensor] = []
        self.synced = bool(self._read) and not runtime.alone

    def __bool__(self) -> bool:
        return bool(self._places)

    def __contains__(self, place: Place) -> bool:
        return place in self._places

    def sync(self) -> None:
        """Replace the buffers that training reads by those of rank 0, equal in shape."""
        if self.synced:
            broadcast_over_ranks((_buffer(place).detach() for place in self._read), self._runtime)

    def keep(self) -> None:
        """Remember the values before a step."""
        self._before = [_buffer(place) for place in self._places]
        values = [tensor.detach() for tensor in self._before]
        if [t.shape for t in values] == [t.shape for t in self._copies]:
            torch._foreach_copy_(self._copies, values)
        else:
            self._copies = [tensor.clone() for tensor in values]

    def restore_where(self, skipped: torch.Tensor) -> None:
        """Put the remembered values back if the step was skipped; nothing waits to find out.

        Args:
            skipped: Tensor without dimensions, on the device of the buffers; 1 if it was, else 0.
        """
        now = [_buffer(place) for place in self._places]
        if [t.shape for t in now] != [t.shape for t in self._copies]:
            self._restore_resized(skipped)
            return
        is_skipped = skipped.bool()
        for dtype in dict.fromkeys(tensor.dtype for tensor in now):
            chosen = [number for number, tensor in enumerate(now) if tensor.dtype == dtype]
            kept, new = ([all_of[n] for n in chosen] for all_of in (self._copies, now))
            flat = torch.where(is_skipped, _flat(kept), _flat(new))
            parts = torch.split(flat, [tensor.numel() for tensor in new])
            values = [part.view(t.shape) for part, t in zip(parts, new, strict=True)]
            self._write(dict(zip(chosen, values, strict=True)))

    def _write(self, values: dict[int, torch.Tensor]) -> None:
        """Write in place; a buffer that was assigned may share its memory, and is assigned."""
        places = {number: self._places[number] for number in values}
        in_place = [n for n, place in places.items() if _buffer(place) is self._before[n]]
        if in_place:
            written = [_buffer(places[n]).detach() for n in in_place]
            torch._foreach_copy_(written, [values[n] for n in in_place])
        for number in values.keys() - set(in_place):
            _set(places[number], values[number].clone())

    def _restore_resized(self, skipped: torch.Tensor) -> None:
        """Restore buffers of which some got another shape, such as at their first use."""
        if bool(skipped):  # waits for the device, in a step that made memory anyway
            for place, copy in zip(self._places, self._copies, strict=True):
                _set(place, copy.clone())


def buffers_by_name(modules: Mapping[str, nn.Module]) -> dict[str, Place]:
    """List all buffers of some modules by their full names; a shared one has its first name.

    Args:
        modules: Modules with all that is below them, by the beginning of the names; may be empty.
    """
    found: dict[Place, str] = {}
    for where, root in modules.items():
        for path, module in root.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    found.setdefault((module, name), ".".join(filter(None, (where, path, name))))
    return {name: place for place, name in found.items()}


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


def _buffer(place: Place) -> torch.Tensor:
    module, name = place
    buffer = module._buffers[name]
    if buffer is None:
        raise RuntimeError(f"the buffer {name} of {type(module).__name__} is gone")
    return buffer


def _set(place: Place, value: torch.Tensor) -> None:
    module, name = place
    module._buffers[name] = value


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
