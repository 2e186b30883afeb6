"""Data set in memory that returns whole batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddp_sgd.errors import DataError


class InMemory:
    """Inputs and targets of equal length, as arrays or tensors.

    A batch is one indexing operation, not one per sample and a collation: ``__getitems__`` returns
    whole batches, which the loader passes on unchanged.

    Args:
        inputs: Array or tensor of n samples along the first dimension.
        targets: Array or tensor of n targets along the first dimension.

    Raises:
        DataError: The lengths differ.

    Example:
        >>> import numpy
        >>> len(InMemory(numpy.zeros((5, 2)), numpy.zeros(5)))
        5
    """

    def __init__(self, inputs: Any, targets: Any) -> None:
        if len(inputs) != len(targets):
            raise DataError(
                f"the data set has {len(inputs)} inputs and {len(targets)} targets; give each "
                "input one target."
            )
        self.inputs = inputs
        self.targets = targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Any, Any]:
        """Return the inputs and the targets of a batch, each stacked along the first dimension."""
        return _take(self.inputs, indices), _take(self.targets, indices)


def _take(part: Any, indices: Sequence[int] | NDArray[np.int64]) -> Any:
    if not isinstance(part, np.ndarray):
        import torch

        try:
            return part.index_select(0, torch.as_tensor(indices))
        except AttributeError as error:
            raise DataError(
                f"the data set holds a {type(part).__name__}; give InMemory arrays or tensors, "
                "such as numpy.array(values, numpy.float32)."
            ) from error
    # take() is three times as fast as indexing, but would copy all of a strided array.
    return part.take(indices, axis=0) if part.flags.c_contiguous else part[indices]
