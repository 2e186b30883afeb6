"""Trees of tensors: leaves with their paths, map over leaves, tensors of any object, tensor bytes.

A tree is a leaf, or a mapping, list or tuple of trees: samples, batches, states, outputs.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

_SHOWN = 6
"""Components of a container that an error describes."""

_DEEPEST = 6
"""Objects within objects that are looked at: attributes may refer back to their owner."""


def leaves(
    tree: Any, *, is_leaf: Callable[[Any], bool] | None = None
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the leaves of a tree, each after its path: keys of mappings and positions.

    Args:
        tree: Mappings, lists and tuples, nested, in whose order the leaves come; an empty one has
            no leaves.
        is_leaf: Whether a container is taken for a leaf.
    """
    yield from _leaves((), tree, is_leaf)


def _leaves(
    path: tuple[Any, ...], tree: Any, is_leaf: Callable[[Any], bool] | None
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if not isinstance(tree, (Mapping, list, tuple)) or (is_leaf is not None and is_leaf(tree)):
        yield path, tree
        return
    for key, item in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from _leaves((*path, key), item, is_leaf)


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a tree."""
    return (leaf for _, leaf in leaves(tree) if isinstance(leaf, torch.Tensor))


def map_leaves(
    change: Callable[[Any], Any], tree: Any, *, is_leaf: Callable[[Any], bool] | None = None
) -> Any:
    """Return a tree with every leaf replaced: of the same lists and tuples, and of dicts.

    Args:
        change: Gives what takes the place of a leaf.
        tree: Mappings, lists and tuples, nested.
        is_leaf: Whether a container, such as a tuple with methods of its own, is taken for a leaf.
    """
    # Tensors soonest: batches come here, and the check for Mapping takes four times as long.
    is_plain = isinstance(tree, torch.Tensor) or not isinstance(tree, (Mapping, list, tuple))
    if is_plain or (is_leaf is not None and is_leaf(tree)):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_leaves(change, item, is_leaf=is_leaf) for key, item in tree.items()}
    items = [map_leaves(change, item, is_leaf=is_leaf) for item in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def map_tensors(
    change: Callable[[torch.Tensor], torch.Tensor], outputs: Any, *, deepest: int = _DEEPEST
) -> Any:
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


def describe(value: Any) -> str:
    """Describe a value, for an error: type and shape of tensors, else the class."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        parts = [f"{key}: {describe(item)}" for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        named = zip(value._fields, value, strict=True)
        parts = [f"{name}: {describe(item)}" for name, item in named]
    elif isinstance(value, (list, tuple)):
        parts = [describe(item) for item in value]
    else:
        parts = []
    shown = ", ".join(parts[:_SHOWN]) + (", ..." if len(parts) > _SHOWN else "")
    return f"a {type(value).__name__} of ({shown})" if parts else f"a {type(value).__name__}"


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the numbers of a tensor as bytes, in the order of its indices.

    Args:
        tensor: Any dtype and layout: strided, expanded, sparse or quantized.

    Returns:
        uint8 tensor of shape (nbytes,) on the same device; it shares memory with a contiguous
        tensor, and is a copy of any other.
    """
    tensor = tensor.detach()
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return torch.cat([bytes_of(tensor.indices()), bytes_of(tensor.values())])
    if tensor.layout is not torch.strided:
        return torch.cat([bytes_of(part) for part in _compressed_parts(tensor)])
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    packed = tensor.resolve_conj().resolve_neg().contiguous()
    # Not reshape: one element of an expanded tensor counts as contiguous with a stride of 0.
    return packed.as_strided((packed.numel(),), (1,)).view(torch.uint8)


def _compressed_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()
