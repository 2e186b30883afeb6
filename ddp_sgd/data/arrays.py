"""Data set of arrays in a ``.npz`` file."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddp_sgd.data.in_memory import InMemory
from ddp_sgd.errors import DataError

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
