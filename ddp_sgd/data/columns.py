"""Rows with named columns, such as those of Hugging Face data sets, as (input, target)."""

from collections.abc import Callable
from typing import Any

from ddp_sgd.errors import DataError


class Columns:
    """Two columns of a data set whose samples are mappings.

    Args:
        rows: Map-style data set; a sample is a mapping from column to value.
        input: Column that the model sees.
        target: Column that the loss compares with.
        transform: Applied to each input, such as an augmentation; None changes nothing.

    Raises:
        DataError: On reading a row that lacks a column.
    """

    def __init__(
        self,
        rows: Any,
        input: str,
        target: str,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        self._rows = rows
        self._input = input
        self._target = target
        self._transform = transform

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._rows[index]
        for column in (self._input, self._target):
            if column not in row:
                raise DataError(f"column {column} is not in {', '.join(row)}; name one of those.")
        value = row[self._input]
        return (self._transform(value) if self._transform else value), row[self._target]
