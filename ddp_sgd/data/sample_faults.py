"""Collate errors: which samples do not form a batch, in which part, and what helps."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import default_collate

_COLLATE = "name a function from samples to a batch by data.collate"
_HALVES = ("input", "target")


class _Difference(NamedTuple):
    """Two samples that do not stack: where, and what either has there."""

    path: str
    first: str
    second: str


def is_pair(value: Any) -> bool:
    """Whether a sample or a batch has the form (input, target)."""
    return isinstance(value, (tuple, list)) and len(value) == 2


def shape_of(value: Any) -> str:
    """Say what a sample or a batch is, for an error."""
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def no_pair(sample: Any, where: str, index: int) -> str:
    """Say that a sample is not (input, target), and what would make it so.

    Args:
        sample: What the data set gave.
        where: Its key in the configuration.
        index: Number of the sample.
    """
    return (
        f"{where}[{index}] is {shape_of(sample)}, not (input, target); return a pair, "
        f"{_choose(sample, where)}or {_COLLATE}."
    )


def no_batch(samples: Sequence[Any], where: str, indices: Sequence[int], error: Exception) -> str:
    """Say why torch's default_collate forms no batch of samples, and what would.

    Args:
        samples: Pairs (input, target).
        where: Key of the data set in the configuration.
        indices: Numbers of the samples.
        error: What default_collate raised.
    """
    for sample, index in zip(samples, indices, strict=True):
        for half, part in zip(_HALVES, sample, strict=True):
            for path, leaf in _leaves(part, half):
                if not _stacks(leaf):
                    return f"the {path} of {where}[{index}] is {_of_leaf(leaf, half, where)}"
    for sample, index in zip(samples[1:], indices[1:], strict=True):
        for half, part, other in zip(_HALVES, samples[0], sample, strict=True):
            for difference in _differences(part, other, half):
                return (
                    f"the {difference.path} of {where}[{indices[0]}] has {difference.first} and "
                    f"that of {where}[{index}] {difference.second}, which form no batch; give "
                    f"all samples the same shapes and keys, such as by padding, or {_COLLATE}."
                )
    return (
        f"{where} gave samples that do not form a batch (from index {indices[0]} on), "
        f"{type(error).__name__}: {error}; give all samples the same shapes and number types, or "
        f"{_COLLATE}."
    )


def no_tensor(array: Any, where: str, error: Exception) -> str:
    """Say that an array of a whole batch becomes no tensor, and what would."""
    return f"{where} gives {_of_array(array, error)}"


def _choose(sample: Any, where: str) -> str:
    """Show how ``Columns`` would choose from a sample, if it would."""
    by_name = isinstance(sample, Mapping)
    if not (by_name or isinstance(sample, (tuple, list))) or len(sample) < 2:
        return ""
    names = list(sample) if by_name else range(len(sample))
    return (
        f"choose by {'name' if by_name else 'position'} with {where}.class_path="
        f"ddp_sgd.data.Columns and init_args {{rows: (the data set of now), input: {names[0]}, "
        f"target: {names[-1]}}}, "
    )


def _leaves(part: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(part, Mapping):
        for key, item in part.items():
            yield from _leaves(item, f"{path}[{key!r}]")
    elif isinstance(part, (tuple, list)):
        for number, item in enumerate(part):
            yield from _leaves(item, f"{path}[{number}]")
    else:
        yield path, part


def _stacks(leaf: Any) -> bool:
    try:
        default_collate([leaf])
    except Exception:  # each type has its own
        return False
    return True


def _of_leaf(leaf: Any, half: str, where: str) -> str:
    if leaf is None:
        return f"None, which forms no batch; return a tensor or a number, or {_COLLATE}."
    if type(leaf).__module__.startswith("PIL."):
        # A mask must keep its whole numbers; an image becomes float32 in [0, 1].
        argument, kind = (
            ("transform", "ToTensor") if half == "input" else ("target_transform", "PILToTensor")
        )
        return (
            f"a PIL image, which forms no batch; convert it with --{where}.init_args.{argument}."
            f"class_path=torchvision.transforms.{kind} where the data set has that argument, or "
            f"{_COLLATE}."
        )
    if isinstance(leaf, (np.ndarray, np.generic)):
        try:
            torch.as_tensor(leaf)
        except Exception as error:  # TypeError and ValueError, by number type and strides
            return _of_array(leaf, error)
    return (
        f"a {type(leaf).__name__}, which forms no batch; return a tensor, an array or a number, "
        f"or {_COLLATE}."
    )


def _of_array(array: Any, error: Exception) -> str:
    if array.dtype.kind in "OSU":
        return (
            f"an array of type {array.dtype}, which no tensor holds; convert numbers by "
            f".astype(numpy.float32), encode text as numbers, or {_COLLATE}."
        )
    return (
        f"an array of type {array.dtype} that becomes no tensor, {type(error).__name__}: {error}; "
        f"convert it, such as by numpy.ascontiguousarray(array, numpy.float32), or {_COLLATE}."
    )


def _differences(first: Any, second: Any, path: str) -> Iterator[_Difference]:
    """Find where two parts of samples differ in form."""
    forms = _form(first), _form(second)
    if forms[0] != forms[1]:
        yield _Difference(path, *forms)
    elif isinstance(first, Mapping):
        for key, item in first.items():
            yield from _differences(item, second[key], f"{path}[{key!r}]")
    elif isinstance(first, (tuple, list)):
        for number, items in enumerate(zip(first, second, strict=True)):
            yield from _differences(*items, f"{path}[{number}]")


def _form(part: Any) -> str:
    if isinstance(part, Mapping):
        return f"the keys {', '.join(sorted(map(str, part)))}"
    if isinstance(part, (tuple, list)):
        return f"{len(part)} items"
    if isinstance(part, (torch.Tensor, np.ndarray)):
        return f"the shape {tuple(part.shape)}"
    return f"the type {type(part).__name__}"
