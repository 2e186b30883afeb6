"""Broadcast of parameters and buffers from rank 0."""

import torch
from torch import nn

from ddp_sgd.distributed.collectives import (
    broadcast_over_ranks,
    from_rank_0,
    gather_over_ranks,
)
from ddp_sgd.distributed.runtime import Runtime


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
