"""Tensors in the outputs of a model, in lists, mappings, and objects with attributes."""

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

Change = Callable[[torch.Tensor], torch.Tensor]

_DEEPEST = 6
"""Objects within objects that are looked at: attributes may refer back to their owner."""


def map_tensors(change: Change, outputs: Any, *, deepest: int = _DEEPEST) -> Any:
    """Return outputs with every tensor replaced; what holds them is copied, not changed.

    Torch's own tree functions stop at classes that are not registered, such as dataclasses and
    subclasses of dict, in which models of public libraries give their outputs.

    Args:
        change: Gives the tensor that takes the place of another.
        outputs: A tensor, or lists, tuples, mappings and objects of such.
        deepest: Objects within objects that are looked at.
    """

    def visit(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        is_plain = leaf is None or isinstance(leaf, (bool, int, float, str, bytes, type, nn.Module))
        if is_plain or deepest == 0:
            return leaf
        return _map_object(lambda each: map_tensors(change, each, deepest=deepest - 1), leaf)

    return tree_map(visit, outputs)


def list_tensors(outputs: Any) -> list[torch.Tensor]:
    """List the tensors in outputs, in a fixed order.

    Args:
        outputs: A tensor, or lists, tuples, mappings and objects of such.
    """
    found: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, outputs)
    return found


def _map_object(change: Callable[[Any], Any], value: Any) -> Any:
    """Copy an object of a class that torch does not know, with its items and attributes changed."""
    try:
        copied = copy.copy(value)
        if isinstance(copied, MutableMapping):
            for key in list(copied):
                copied[key] = change(copied[key])
        elif isinstance(copied, list):
            copied[:] = [change(item) for item in copied]
        for name in dict.fromkeys(_attributes_of(copied)):
            object.__setattr__(copied, name, change(getattr(copied, name)))
    except Exception:  # an object that cannot be copied or written to stays as it is
        return value
    return copied


def _attributes_of(value: Any) -> Iterator[str]:
    yield from getattr(value, "__dict__", {})
    if dataclasses.is_dataclass(value):  # perhaps with slots
        yield from (field.name for field in dataclasses.fields(value))
