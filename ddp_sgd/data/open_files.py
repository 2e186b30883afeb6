"""File handles of data sets, closed before workers start, so that each worker opens its own."""

import io
import pickle
from collections.abc import Iterator
from typing import Any

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
        """Say that it takes bytes."""
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
    except Exception:  # whatever an object raises that cannot be pickled
        return False
    return True
