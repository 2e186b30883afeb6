"""Data set in memory that returns whole batches.

Data set of (input, target) pairs chosen from samples of several columns.

Handwritten digits that come with the package: 1,797 real images of 8 x 8 pixels.
"""

from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddp_sgd.data.selection import Choice, Selection
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
            return part.index_select(0, torch.as_tensor(indices, device=part.device))
        except AttributeError as error:
            raise DataError(
                f"the data set holds a {type(part).__name__}; give InMemory arrays or tensors, "
                "such as numpy.array(values, numpy.float32)."
            ) from error
    # take() is three times as fast as indexing, but would copy all of a strided array.
    return part.take(indices, axis=0) if part.flags.c_contiguous else part[indices]


def require_numbers(array: NDArray[Any], name: str) -> None:
    """Refuse an array that does not hold real numbers, one row per sample.

    Args:
        array: Read from a file.
        name: What it is, for the error.

    Raises:
        DataError: It is of another type, or has no dimension.
    """
    if array.ndim == 0 or array.dtype.kind not in "buif":
        raise DataError(
            f"{name} is of type {array.dtype} and shape {array.shape}; save numbers, one row a "
            "sample."
        )


def as_inputs(array: NDArray[Any]) -> NDArray[Any]:
    """Return inputs as a model takes them: bytes (uint8) as they are, other numbers as float32."""
    return array if array.dtype == np.uint8 else array.astype(np.float32, copy=False)


def as_targets(array: NDArray[Any]) -> NDArray[Any]:
    """Return targets as a loss takes them: whole numbers as int64 (classes), others as float32."""
    return array.astype(np.float32 if array.dtype.kind == "f" else np.int64, copy=False)


class Columns:
    """Chosen parts of the samples of a data set, by name or by position, and transforms of them.

    Where neither needs a transform, ``data.input`` and ``data.target`` do the same without it.

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
        self._select = Selection(input, target, keys=("input", "target"))
        self._transforms = (transform, target_transform)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        chosen, wanted = self._select(self._rows[index], f"rows[{index}]")
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


class Digits(InMemory):
    """The digits 0 to 9: 1,437 images to train on, 360 to score, in a fixed stratified split.

    Args:
        split: ``train`` or ``eval``.
        shape: ``flat`` gives inputs of shape (64,), ``image`` of (1, 8, 8); float32 in [0, 1].

    Raises:
        DataError: Another split or shape is requested.

    Source:
        E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998, doi:10.24432/C50P49, licence CC BY 4.0; its test part, as scikit-learn
        ships it. See ``digits.md`` beside the file for how it was made.
    """

    def __init__(
        self, split: Literal["train", "eval"] = "train", shape: Literal["flat", "image"] = "flat"
    ) -> None:
        if split not in ("train", "eval"):
            raise DataError(f"split is {split!r}; choose train or eval.")
        if shape not in ("flat", "image"):
            raise DataError(f"shape is {shape!r}; choose flat or image.")
        with files("ddp_sgd.data").joinpath("digits.npz").open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            chosen = archive["is_eval"] == (split == "eval")
            pixels = archive["pixels"][chosen].astype(np.float32) / 16
            targets = archive["labels"][chosen].astype(np.int64)
        super().__init__(pixels.reshape((-1, 64) if shape == "flat" else (-1, 1, 8, 8)), targets)
