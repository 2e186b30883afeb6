"""Collate errors: which samples do not form a batch, in which part, and what helps.

``__getitems__`` of data sets: which return whole batches, and whether these are valid.

torch names two kinds of data sets with that method. Its own give a list of samples; those of this
package, and of users who want speed, give a pair of stacked parts. A part is a tensor or an array
of one row per index, a list of one entry per index, or a mapping or tuple of such.

File handles of data sets, closed before workers start, so that each worker opens its own.
"""

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import StackDataset, TensorDataset, default_collate

from ddp_sgd.data.selection import Selection
from ddp_sgd.errors import DataError, UserError
from ddp_sgd.tree import leaves, map_leaves

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
    """Describe a sample or a batch, for an error."""
    if value is None:
        return "None"
    if isinstance(value, Mapping):
        return f"a mapping with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def no_pair(sample: Any, where: str, index: int) -> str:
    """Describe why a sample is not (input, target), and what would make it so."""
    return (
        f"{where}[{index}] is {shape_of(sample)}, not (input, target); return a pair, "
        f"{_choose(sample)}or {_COLLATE}."
    )


def no_batch(samples: Sequence[Any], where: str, indices: Sequence[int], error: Exception) -> str:
    """Describe why torch's default_collate forms no batch of samples, and what would.

    Args:
        samples: Pairs (input, target), or tuples of the input alone.
        where: Key of the data set in the configuration.
        indices: Numbers of the samples.
        error: What default_collate raised.
    """
    for sample, index in zip(samples, indices, strict=True):
        for half, part in zip(_HALVES, sample, strict=False):
            for path, leaf in leaves(part):
                if not _stacks(leaf):
                    place = half + "".join(f"[{key!r}]" for key in path)
                    return f"the {place} of {where}[{index}] is {_of_leaf(leaf, half, where)}"
    for sample, index in zip(samples[1:], indices[1:], strict=True):
        for half, part, other in zip(_HALVES, samples[0], sample, strict=False):
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
    """Describe why an array of a whole batch becomes no tensor, and what would."""
    return f"{where} gives {_of_array(array, error)}"


def _choose(sample: Any) -> str:
    """Show how parts of a sample would be chosen, if they could be."""
    by_name = isinstance(sample, Mapping)
    if not (by_name or isinstance(sample, (tuple, list))) or len(sample) < 2:
        return ""
    names = list(sample) if by_name else range(len(sample))
    return (
        f"choose by {'name' if by_name else 'position'} with --data.input={names[0]} "
        f"--data.target={names[-1]}, "
    )


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


_STACKED = (torch.Tensor, np.ndarray)


def has_epochs(dataset: Any) -> bool:
    """Whether a data set has a method ``set_epoch``, and so may change with the epoch."""
    return callable(getattr(dataset, "set_epoch", None))


def may_give_whole_batches(dataset: Any, *, in_pairs: bool = True) -> bool:
    """Whether ``__getitems__`` reads the samples, and may return more than a list of them.

    Args:
        dataset: Map-style data set.
        in_pairs: Whether a sample has to be a pair.
    """
    kind = type(dataset)
    if isinstance(dataset, TensorDataset):  # unless a subclass reads its samples differently
        fits = len(dataset.tensors) == 2 or not in_pairs
        return kind.__getitem__ is TensorDataset.__getitem__ and fits
    if not callable(getattr(kind, "__getitems__", None)) or len(dataset) == 0:
        return False
    # It takes each of its data sets for a list of samples, and fails where one gives a pair.
    if isinstance(dataset, StackDataset) and kind.__getitems__ is StackDataset.__getitems__:
        return False
    # Of two methods the more derived one reads the samples.
    return _depth(kind, "__getitems__") <= _depth(kind, "__getitem__")


def draws_numbers(dataset: Any) -> bool:
    """Whether reading a batch may draw random numbers; the data sets of this package do not."""
    return not type(dataset).__getitems__.__module__.startswith("ddp_sgd.data.")


def gives_whole_batches(dataset: Any, where: str, selection: Selection | None = None) -> bool:
    """Try ``__getitems__`` with one index: whether it gives stacked parts, a pair unless chosen.

    Args:
        dataset: Data set with that method, of at least one sample.
        where: Its key in the configuration, for errors.
        selection: Chooses inputs and targets of the parts; None: these are a pair.

    Returns:
        False for a list of samples, as torch expects: these are read by ``__getitem__``.

    Raises:
        DataError: It fails, or gives something else.
    """
    batch = take_whole_batch(dataset, [0], where)
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        return False
    if selection is not None:
        batch = selection(batch, f"a batch of {where}")
    require_rows(batch, [0], where, has_targets=selection is None or selection.has_target)
    return True


def take_whole_batch(dataset: Any, indices: Sequence[int], where: str) -> Any:
    """Call ``__getitems__``.

    Raises:
        DataError: It fails; the message names the indices.
    """
    try:
        return dataset.__getitems__(indices)
    except UserError:
        raise
    except Exception as error:  # any error of a user's data set
        raise DataError(
            f"{where}.__getitems__ fails for {_shown(indices)}, {type(error).__name__}: {error}; "
            "let it serve any number of indices, since ranks also read single samples, or remove "
            "it, so that samples are read one by one."
        ) from error


def require_rows(
    batch: Any, indices: Sequence[int], where: str, *, has_targets: bool = True
) -> None:
    """Refuse what is not a pair of parts with one row per index.

    Args:
        batch: What ``__getitems__`` gave, or was chosen of it.
        indices: What it was asked for.
        where: Key of the data set in the configuration, for errors.
        has_targets: Whether the second part may not be None.

    Raises:
        DataError: It is something else.
    """
    if not is_pair(batch):
        raise DataError(
            f"{where}.__getitems__ gives {shape_of(batch)} for {_shown(indices)}, not (inputs, "
            "targets); return a pair of stacked parts, or a list of samples."
        )
    for name, part in zip(("inputs", "targets"), batch, strict=True):
        if name == "targets" and not has_targets:
            continue
        if isinstance(part, _STACKED) and part.shape[:1] == (len(indices),):
            continue  # without the search below, since each batch of each step comes here
        for rows in _rows(part):
            if rows != len(indices):
                found = "without rows" if rows is None else f"of {rows} rows"
                raise DataError(
                    f"{where}.__getitems__ gives {name} {found} for {_shown(indices)}; stack one "
                    "row per index, in their order, or return a list of samples."
                )


def single(part: Any, number: int) -> Any:
    """Copy one row of a part, which keeps its first dimension."""

    def copy_row(leaf: Any) -> Any:
        if leaf is None:  # there are no targets
            return None
        row = leaf[number : number + 1]
        # At the start of memory of its own: products may round differently elsewhere.
        return row.clone() if isinstance(row, torch.Tensor) else row

    return map_leaves(copy_row, part, is_leaf=is_list)


def _rows(part: Any) -> Iterator[int | None]:
    """Count the rows of each leaf; None for what has none."""
    for _, leaf in leaves(part, is_leaf=is_list):
        is_sized = isinstance(leaf, Sized) and not isinstance(leaf, (str, bytes))
        yield len(leaf) if is_sized and getattr(leaf, "ndim", 1) > 0 else None


def is_list(part: Any) -> bool:
    """Whether a part is a list, which has one entry per sample."""
    return isinstance(part, list)


def _depth(kind: type, method: str) -> int:
    """How many classes up from its own a method is defined."""
    return next(
        (d for d, each in enumerate(kind.__mro__) if method in vars(each)), len(kind.__mro__)
    )


def _shown(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return f"the index {indices[0]}"
    return f"{len(indices)} indices from {indices[0]} on"


_DEEPEST = 4
"""Data sets within data sets that are looked at, as in subsets and concatenations."""

_ENOUGH_BYTES = 2**16
"""A pickle of this size will not fail for an open file any more, or at too high a price to know."""

_NOTHING = object()


class OpenFiles:
    """What data sets open at their first read, such as an HDF5 file.

    A data set may put off opening a file to the first read in each loader process, since such
    files can neither be pickled nor shared after a fork. The checks before a run read, too.

    Args:
        datasets: Data sets that nothing was read from; None is left out.
    """

    def __init__(self, *datasets: Any) -> None:
        found = {id(each): each for dataset in datasets for each in _with_parts(dataset)}
        self._before = [(each, dict(vars(each))) for each in found.values()]

    def close(self) -> None:
        """Put the attributes back that were set since, and that no other process could use."""
        for dataset, before in self._before:
            for name, value in list(vars(dataset).items()):
                if value is not before.get(name, _NOTHING) and not _can_be_sent(value):
                    vars(dataset).pop(name)
                    vars(dataset).update({name: before[name]} if name in before else {})


def _with_parts(dataset: Any, deepest: int = _DEEPEST) -> Iterator[Any]:
    """Yield a data set and those that it holds."""
    if isinstance(dataset, (list, tuple)) and deepest:
        for part in dataset[:_DEEPEST]:
            yield from _with_parts(part, deepest - 1)
    elif hasattr(dataset, "__getitem__") and hasattr(dataset, "__dict__"):
        yield dataset
        for part in list(vars(dataset).values()) if deepest else ():
            yield from _with_parts(part, deepest - 1)


class _Limited(io.RawIOBase):
    """Takes bytes up to a limit."""

    def __init__(self) -> None:
        super().__init__()
        self._left = _ENOUGH_BYTES

    def writable(self) -> bool:
        """Return True: bytes can be written."""
        return True

    def write(self, data: Any) -> int:
        """Count the bytes; raises where there are too many."""
        self._left -= len(data)
        if self._left < 0:
            raise _IsLongError
        return len(data)


class _IsLongError(Exception):
    """A pickle is longer than is worth looking at."""


def _can_be_sent(value: Any) -> bool:
    try:
        pickle.Pickler(_Limited()).dump(value)
    except _IsLongError:
        return True
    except Exception:  # any error of an object that cannot be pickled
        return False
    return True
