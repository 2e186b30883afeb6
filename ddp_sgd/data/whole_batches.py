"""``__getitems__`` of data sets: which return whole batches, and whether these are valid.

torch names two kinds of data sets with that method. Its own give a list of samples; those of this
package, and of users who want speed, give a pair of stacked parts. A part is a tensor or an array
of one row per index, a list of one entry per index, or a mapping or tuple of such.
"""

from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import StackDataset, TensorDataset

from ddp_sgd.data.sample_faults import is_pair, shape_of
from ddp_sgd.errors import DataError, UserError

_STACKED = (torch.Tensor, np.ndarray)


def may_give_whole_batches(dataset: Any) -> bool:
    """Whether ``__getitems__`` says how samples are read, and may give more than a list of them."""
    kind = type(dataset)
    if isinstance(dataset, TensorDataset):  # unless a subclass reads its samples differently
        return kind.__getitem__ is TensorDataset.__getitem__ and len(dataset.tensors) == 2
    if not callable(getattr(kind, "__getitems__", None)) or len(dataset) == 0:
        return False
    # It takes each of its data sets for a list of samples, and fails where one gives a pair.
    if isinstance(dataset, StackDataset) and kind.__getitems__ is StackDataset.__getitems__:
        return False
    # Of two methods the more derived one says how samples are read.
    return _depth(kind, "__getitems__") <= _depth(kind, "__getitem__")


def draws_numbers(dataset: Any) -> bool:
    """Whether reading a batch may draw random numbers; the data sets of this package do not."""
    return not type(dataset).__getitems__.__module__.startswith("ddp_sgd.data.")


def gives_whole_batches(dataset: Any, where: str) -> bool:
    """Try ``__getitems__`` with one index: whether it gives a pair of stacked parts.

    Args:
        dataset: Data set with that method, of at least one sample.
        where: Its key in the configuration, for errors.

    Returns:
        False for a list of samples, as torch expects: these are read by ``__getitem__``.

    Raises:
        DataError: It fails, or gives something else.
    """
    batch = take_whole_batch(dataset, [0], where)
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        return False
    require_rows(batch, [0], where)
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
    except Exception as error:  # whatever a user's data set raises
        raise DataError(
            f"{where}.__getitems__ fails for {_shown(indices)}, {type(error).__name__}: {error}; "
            "let it serve any number of indices, since ranks also read single samples, or remove "
            "it, so that samples are read one by one."
        ) from error


def require_rows(batch: Any, indices: Sequence[int], where: str) -> None:
    """Refuse what is not a pair of parts with one row per index.

    Raises:
        DataError: It is something else.
    """
    if not is_pair(batch):
        raise DataError(
            f"{where}.__getitems__ gives {shape_of(batch)} for {_shown(indices)}, not (inputs, "
            "targets); return a pair of stacked parts, or a list of samples."
        )
    for name, part in zip(("inputs", "targets"), batch, strict=True):
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
    if isinstance(part, Mapping):
        return {key: single(item, number) for key, item in part.items()}
    if isinstance(part, tuple):
        items = [single(item, number) for item in part]
        return type(part)(*items) if hasattr(part, "_fields") else tuple(items)
    row = part[number : number + 1]
    # At the start of memory of its own: products may round differently elsewhere.
    return row.clone() if isinstance(row, torch.Tensor) else row


def _rows(part: Any) -> Iterator[int | None]:
    """Count the rows of each leaf; None for what has none."""
    if isinstance(part, (Mapping, tuple)):
        for item in part.values() if isinstance(part, Mapping) else part:
            yield from _rows(item)
    elif isinstance(part, Sized) and not isinstance(part, (str, bytes)) and _has_rows(part):
        yield len(part)
    else:
        yield None


def _has_rows(part: Any) -> bool:
    return getattr(part, "ndim", 1) > 0


def _depth(kind: type, method: str) -> int:
    """How many classes up from its own a method is defined."""
    return next(
        (d for d, each in enumerate(kind.__mro__) if method in vars(each)), len(kind.__mro__)
    )


def _shown(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return f"the index {indices[0]}"
    return f"{len(indices)} indices from {indices[0]} on"
