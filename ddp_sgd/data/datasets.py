"""Data set in memory that returns whole batches.

Data set of arrays in a ``.npz`` file.

Data set of (input, target) pairs chosen from samples of several columns.

Handwritten digits that come with the package: 1,797 real images of 8 x 8 pixels.
"""

import zipfile
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
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


_KEYS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}


class Arrays(InMemory):
    """The arrays x_train and y_train, or x_test and y_test, of a ``.npz`` file.

    Images of bytes become numbers in [0, 1], batch by batch; other inputs become float32. Whole
    numbers as targets become int64 (classes), others float32.

    Args:
        path: The file, as ``numpy.savez`` writes it; read without pickle. ~ is the home folder.
        split: Which pair of arrays.

    Raises:
        DataError: The file is missing or broken, or lacks the arrays.
    """

    def __init__(self, path: str, split: Literal["train", "test"] = "train") -> None:
        if split not in _KEYS:
            raise DataError(f"split is {split!r}; choose train or test.")
        inputs, targets = _read(Path(path).expanduser(), _KEYS[split])
        if inputs.dtype != np.uint8:
            inputs = inputs.astype(np.float32)
        whole = np.issubdtype(targets.dtype, np.integer) or targets.dtype == np.bool_
        super().__init__(inputs, targets.astype(np.int64 if whole else np.float32))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return _to_float(self.inputs[index]), self.targets[index]

    def __getitems__(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Any, Any]:
        """Return the inputs as float32 and the targets of a batch."""
        inputs, targets = super().__getitems__(indices)
        return _to_float(inputs), targets


def _to_float(inputs: Any) -> Any:
    return np.float32(1 / 255) * inputs if inputs.dtype == np.uint8 else inputs


def _read(path: Path, keys: tuple[str, str]) -> list[Any]:
    try:
        arrays = _load(path, keys)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; give the path of a .npz file.") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not a readable .npz file: {error}; write it with numpy.savez."
        ) from error
    for key, array in zip(keys, arrays, strict=True):
        if array.ndim == 0 or array.dtype.kind not in "buif":
            raise DataError(
                f"{key} in {path} is of type {array.dtype} and shape {array.shape}; save numbers, "
                "one row a sample."
            )
    return arrays


def _load(path: Path, keys: tuple[str, str]) -> list[Any]:
    with path.open("rb") as stream:
        archive = np.load(stream, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(
                f"{path} is a single array; write {keys[0]} and {keys[1]} by numpy.savez."
            )
        missing = [key for key in keys if key not in archive]
        if missing:
            raise DataError(
                f"{path} has {', '.join(archive.files) or 'no arrays'} and no {missing[0]}; "
                f"save it with numpy.savez(path, {keys[0]}=..., {keys[1]}=...)."
            )
        return [archive[key] for key in keys]


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
