"""Data set of (input, target) pairs chosen from samples of several columns."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddp_sgd.errors import DataError

Choice = str | int | Sequence[str] | Sequence[int]
"""Name or position of a part of a row, or several of the same kind."""


class Columns:
    """Chosen parts of the samples of a data set, by name or by position.

    Args:
        rows: Map-style data set; a sample is a mapping, or a tuple or list.
        input: What the model sees: the name of a part of a mapping, or the position of a part of a
            tuple or list, from 0. A list of names gives a mapping of these parts, a list of
            positions a tuple.
        target: What the loss compares with, in the same way.
        transform: Applied to each input, such as an augmentation; None changes nothing.
        target_transform: Applied to each target; None changes nothing.

    Raises:
        DataError: ``input`` or ``target`` is neither names nor positions; or, on reading, a row
            lacks a part.

    Example:
        >>> rows = [{"ids": 1, "mask": 2, "label": 3}]
        >>> Columns(rows, input=["ids", "mask"], target="label")[0]
        ({'ids': 1, 'mask': 2}, 3)
        >>> Columns([(1, 2, 3)], input=[0, 1], target=2)[0]
        ((1, 2), 3)
    """

    def __init__(
        self,
        rows: Any,
        input: Choice,
        target: Choice,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[Any], Any] | None = None,
    ) -> None:
        _check_choice(input, "input")
        _check_choice(target, "target")
        self._rows = rows
        self._choices = (input, target)
        self._transforms = (transform, target_transform)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._rows[index]
        chosen, wanted = (_choose(row, choice) for choice in self._choices)
        transform, target_transform = self._transforms
        return (
            transform(chosen) if transform else chosen,
            target_transform(wanted) if target_transform else wanted,
        )


def _check_choice(choice: Choice, argument: str) -> None:
    each = [choice] if isinstance(choice, (str, int)) else choice
    fits = isinstance(each, (list, tuple)) and (
        all(isinstance(one, str) for one in each)
        or all(isinstance(one, int) and not isinstance(one, bool) for one in each)
    )
    if not (fits and each):
        raise DataError(
            f"{argument} is {choice!r}; give a name, a position, or a list of either, such as 0."
        )


def _choose(row: Any, choice: Choice) -> Any:
    if isinstance(choice, (str, int)):
        return _part(row, choice)
    if isinstance(choice[0], str):
        return {name: _part(row, name) for name in choice}
    return tuple(_part(row, position) for position in choice)


def _part(row: Any, key: str | int) -> Any:
    if isinstance(row, Mapping):
        if key not in row:
            names = ", ".join(map(str, row))
            raise DataError(f"column {key} is not in {names}; name one of those.")
        return row[key]
    if not isinstance(row, (tuple, list)):
        raise DataError(
            f"a row is a {type(row).__name__}; give ddp_sgd.data.Columns rows that are mappings, "
            "tuples or lists."
        )
    if not isinstance(key, int) or not -len(row) <= key < len(row):
        what = "column" if isinstance(key, str) else "position"
        raise DataError(
            f"{what} {key} is not in a {type(row).__name__} of {len(row)}; give a position from 0 "
            f"to {len(row) - 1}."
        )
    return row[key]
