"""Trees of tensors: leaves with their paths, map over leaves, tensors of any object, differences.

A tree is a leaf, or a mapping, list or tuple of trees: samples, batches, states, outputs.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from ddp_sgd.text import MASK, columns, is_secret

_SHOWN_PARTS = 6
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
    shown = ", ".join(parts[:_SHOWN_PARTS]) + (", ..." if len(parts) > _SHOWN_PARTS else "")
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


_HEAD = ("tensor", "elements", "differ", "max abs", "relative L2", "")
_SHOWN = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What is not the same under one name.

    Args:
        name: Name of the tensor.
        misfit: What cannot be compared: one is absent, or shape or type differ; else empty.
        elements: Elements of the tensor.
        differing: Elements whose bytes differ.
        max_abs: Largest distance of two elements.
        relative: L2 norm of the distance over the L2 norm of the first tensor.
    """

    name: str
    misfit: str = ""
    elements: int = 0
    differing: int = 0
    max_abs: float = math.nan
    relative: float = math.nan


def compare_trees(first: Any, second: Any) -> list[Difference]:
    """Compare tensors and plain data by name, byte by byte.

    Args:
        first: Mappings and lists of tensors and plain data, nested.
        second: The same.

    Returns:
        What differs, in the order of the first; distances are worked out in float64.
    """
    one, other = by_path(first), by_path(second)
    names = [*one, *(name for name in other if name not in one)]
    found = (_compare(name, one, other) for name in names)
    return [difference for difference in found if difference is not None]


def misfits(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the names that are absent in one of two states, or of another shape or type."""
    lines = []
    for name in [*saved, *(name for name in now if name not in saved)]:
        was, is_now = _kind_at(saved, name), _kind_at(now, name)
        if was != is_now:
            lines.append(f"{name} was {was}, is {is_now}")
    return lines


def compare_plain(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """List the settings in which two nested mappings differ, such as ``epochs: 2 -> 3``."""
    one, other = by_path(first), by_path(second)
    names = [*one, *(name for name in other if name not in one)]
    return [
        f"{name}: differs, {MASK}"
        if is_secret(name)
        else f"{name}: {one.get(name, 'absent')} -> {other.get(name, 'absent')}"
        for name in names
        if one.get(name, by_path) != other.get(name, by_path)  # no value equals a function
    ]


def difference_lines(found: Sequence[Difference]) -> list[str]:
    """Show differences as a table: those that cannot be compared first, then the largest."""
    ordered = sorted(found, key=lambda entry: (not entry.misfit, -_size(entry)))
    rows = [
        (entry.name, *(("-", "-", "-", "-") if entry.misfit else _numbers(entry)), entry.misfit)
        for entry in ordered[:_SHOWN]
    ]
    rest = [f"and {len(ordered) - _SHOWN} more"] if len(ordered) > _SHOWN else []
    return [*columns([_HEAD, *rows], left=(0, len(_HEAD) - 1)), *rest] if rows else []


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their dotted paths; an empty mapping or list is one."""

    def is_empty(value: Any) -> bool:
        return value is not tree and not value

    return {".".join(map(str, path)): leaf for path, leaf in leaves(tree, is_leaf=is_empty)}


def _kind_at(values: Mapping[str, Any], name: str) -> str:
    """Describe the value of a name: type and shape of a tensor, else its class."""
    if name not in values:
        return "absent"
    value = values[name]
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _compare(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Difference | None:
    was, is_now = _kind_at(one, name), _kind_at(other, name)
    if was != is_now:
        return Difference(name=name, misfit=f"{was} -> {is_now}")
    a, b = one[name], other[name]
    if not isinstance(a, torch.Tensor):
        return None if a == b else Difference(name=name, misfit=f"{a!r:.30} -> {b!r:.30}")
    differing = int((_bytes(a) != _bytes(b)).any(dim=1).sum())
    if not differing:
        return None
    wide = torch.complex128 if a.is_complex() else torch.float64
    before, distance = a.to(wide), (b.to(wide) - a.to(wide)).abs()
    norm, scale = float(distance.norm()), float(before.abs().norm())
    return Difference(
        name=name,
        elements=a.numel(),
        differing=differing,
        max_abs=float(distance.max()),
        relative=norm / scale if scale else math.inf if norm else 0.0,
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return bytes_of(tensor).reshape(-1, tensor.element_size())


def _size(entry: Difference) -> float:
    """Order by distance; what is not a number counts as farthest."""
    return math.inf if math.isnan(entry.relative) else entry.relative


def _numbers(entry: Difference) -> tuple[str, str, str, str]:
    return (
        f"{entry.elements:,}",
        f"{entry.differing:,}",
        f"{entry.max_abs:.3g}",
        f"{entry.relative:.3g}",
    )
