"""Differences between two state dicts, tensor by tensor."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddp_sgd.text import MASK, columns, is_secret
from ddp_sgd.tree import bytes_of, leaves

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
        was, is_now = describe(saved, name), describe(now, name)
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
        (
            entry.name,
            *(("-", "-", "-", "-") if entry.misfit else _numbers(entry)),
            entry.misfit,
        )
        for entry in ordered[:_SHOWN]
    ]
    rest = [f"and {len(ordered) - _SHOWN} more"] if len(ordered) > _SHOWN else []
    return [*columns([_HEAD, *rows], left=(0, len(_HEAD) - 1)), *rest] if rows else []


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by their dotted paths; an empty mapping or list is one."""

    def is_empty(value: Any) -> bool:
        return value is not tree and not value

    return {".".join(map(str, path)): leaf for path, leaf in leaves(tree, is_leaf=is_empty)}


def describe(values: Mapping[str, Any], name: str) -> str:
    """Describe the value of a name: type and shape of a tensor, else its class."""
    if name not in values:
        return "absent"
    value = values[name]
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _compare(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Difference | None:
    was, is_now = describe(one, name), describe(other, name)
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
