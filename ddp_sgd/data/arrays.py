"""Data set of arrays in NumPy's files: a ``.npz``, or ``.npy`` files, which are memory-mapped."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddp_sgd.data.datasets import InMemory, as_inputs, as_targets, require_numbers
from ddp_sgd.errors import DataError

_KEYS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}


class Arrays(InMemory):
    """The arrays x_train and y_train, or x_test and y_test, of NumPy's files.

    A ``.npz`` file is read into memory. ``.npy`` files are memory-mapped, read-only: a batch reads
    its own rows, arrays may be larger than memory, and the ranks and loader processes of a host
    share one copy. They must not change while a run reads them.

    Images of bytes in a ``.npz`` file become numbers in [0, 1], batch by batch; in a ``.npy`` file
    they stay bytes, for ``ddp_sgd.data.augment.Normalize`` to make numbers of them on the device.
    Other inputs become float32. Whole numbers as targets become int64 (classes), others float32.

    Args:
        path: A file as ``numpy.savez`` writes it; or a folder of files as ``numpy.save`` writes
            them, ``x_train.npy`` and so on; or, with ``targets``, such a file of inputs. They are
            read without pickle. ~ is the home folder.
        split: Which pair of arrays; with ``targets`` there is one only.
        targets: A ``.npy`` file with the targets of the inputs in ``path``.

    Raises:
        DataError: A file is missing or broken, lacks the arrays, or holds something else.
    """

    def __init__(
        self,
        path: str,
        split: Literal["train", "test"] = "train",
        *,
        targets: str | None = None,
    ) -> None:
        if split not in _KEYS:
            raise DataError(f"split is {split!r}; choose train or test.")
        place = Path(path).expanduser()
        self._files = _find_files(place, split, targets)
        super().__init__(*(_map(self._files) if self._files else _read(place, _KEYS[split])))

    @property
    def is_mapped(self) -> bool:
        """Whether the arrays are memory-mapped, and rows of them are converted batch by batch."""
        return self._files is not None

    def __getstate__(self) -> dict[str, Any]:
        """Leave memory-mapped arrays out of a pickle: another process maps the files itself."""
        left_out = ("inputs", "targets") if self.is_mapped else ()
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._files is not None:
            self.inputs, self.targets = _map(self._files)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self._convert(self.inputs[index], self.targets[index])

    def __getitems__(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Any, Any]:
        """Return the inputs and the targets of a batch."""
        return self._convert(*super().__getitems__(indices))

    def _convert(self, inputs: Any, targets: Any) -> tuple[Any, Any]:
        if self.is_mapped:  # copies, since torch warns of what cannot be written to
            return as_inputs(np.require(inputs, requirements="W")), as_targets(targets)
        return np.float32(1 / 255) * inputs if inputs.dtype == np.uint8 else inputs, targets


def _find_files(path: Path, split: str, targets: str | None) -> tuple[Path, Path] | None:
    """Return the files of inputs and of targets to map; None for one file of both."""
    if targets is None:
        if not path.is_dir():
            return None
        inputs_file, targets_file = (path / f"{key}.npy" for key in _KEYS[split])
        return inputs_file.absolute(), targets_file.absolute()
    if path.is_dir():
        raise DataError(
            f"targets is {targets} while {path} is a folder; give path the file of the inputs, or "
            "leave targets out."
        )
    if split != "train":
        raise DataError(
            f"split is {split} while targets is {targets}, of which there is one; leave split out."
        )
    return path.absolute(), Path(targets).expanduser().absolute()


def _map(files: tuple[Path, Path]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Map the files of inputs and of targets.

    Targets of one number per sample are looked through before the run, by torch, which warns of
    arrays that cannot be written to and computes with few number types. They become one of these.
    """
    inputs, targets = _map_file(files[0], "r"), _map_file(files[1], "c")
    return inputs, as_targets(targets) if targets.ndim == 1 else targets


def _map_file(path: Path, mode: Literal["r", "c"]) -> NDArray[Any]:
    """Map an array, to read only or, by mode ``c``, to copy pages that are written to."""
    try:
        array = np.lib.format.open_memmap(path, mode=mode)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; write it with numpy.save.") from error
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).rstrip(".")
        raise DataError(
            f"{path} is not a readable .npy file: {reason}; write it with numpy.save."
        ) from error
    require_numbers(array, str(path))
    return np.asarray(array)


def _read(path: Path, keys: tuple[str, str]) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        inputs, targets = _load(path, keys)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing; give the path of a .npz file, or of a folder of .npy files."
        ) from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is not a readable .npz file: {error}; write it with numpy.savez."
        ) from error
    for key, array in zip(keys, (inputs, targets), strict=True):
        require_numbers(array, f"{key} in {path}")
    return as_inputs(inputs), as_targets(targets)


def _load(path: Path, keys: tuple[str, str]) -> tuple[NDArray[Any], NDArray[Any]]:
    with path.open("rb") as stream:
        archive = np.load(stream, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise DataError(
                f"{path} is a single array; write {keys[0]} and {keys[1]} by numpy.savez, or name "
                "the .npy file of its targets by targets."
            )
        missing = [key for key in keys if key not in archive]
        if missing:
            raise DataError(
                f"{path} has {', '.join(archive.files) or 'no arrays'} and no {missing[0]}; "
                f"save it with numpy.savez(path, {keys[0]}=..., {keys[1]}=...)."
            )
        return archive[keys[0]], archive[keys[1]]
