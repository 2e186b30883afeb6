"""IDX files, in which MNIST and Fashion-MNIST come: a data set of images and labels."""

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ddp_sgd.data.datasets import InMemory, as_inputs, as_targets
from ddp_sgd.errors import DataError

FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
"""Where Debian's package ``dataset-fashion-mnist`` keeps its files."""

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""Number types of the format by their codes."""

_GZIP = b"\x1f\x8b"


class Idx(InMemory):
    """Images and labels in IDX files, plain or gzip; without arguments, Fashion-MNIST.

    All of them are read into memory. Bytes stay bytes, for ``ddp_sgd.data.augment.Normalize`` to
    make numbers of them on the device; other inputs become float32. Images of shape (n, h, w)
    become (n, 1, h, w), as convolutions take them; inputs of other dimensions keep their shape.
    Whole numbers as labels become int64, others float32.

    Args:
        path: Folder of ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``, the names of MNIST, with
            ``.gz`` or without; or, with ``targets``, a file of images. ~ is the home folder.
        split: ``train`` or ``test``, in a folder; with ``targets`` there is one only.
        targets: File with the labels of the images in ``path``.

    Raises:
        DataError: A file is missing or damaged, or there are not as many labels as images.

    Source:
        Format: Y. LeCun, C. Cortes, C. J. C. Burges: The MNIST database of handwritten digits.
        Fashion-MNIST: H. Xiao, K. Rasul, R. Vollgraf, 2017, arXiv:1708.07747.
    """

    def __init__(
        self,
        path: str = FASHION_MNIST,
        split: Literal["train", "test"] = "train",
        *,
        targets: str | None = None,
    ) -> None:
        files = _find_files(path, split, targets)
        images, labels = (read_idx(file) for file in files)
        if len(images) != len(labels):
            raise DataError(
                f"{files[1]} has {len(labels)} labels while {files[0]} has {len(images)} images; "
                "give each image one label."
            )
        images = as_inputs(images)
        super().__init__(images[:, None] if images.ndim == 3 else images, as_targets(labels))


def _find_files(path: str, split: str, targets: str | None) -> tuple[Path, Path]:
    """Return the files of images and of labels."""
    if split not in _FILES:
        raise DataError(f"split is {split!r}; choose train or test.")
    place = Path(path).expanduser()
    if targets is None:
        images, labels = (_with_suffix(place / name) for name in _FILES[split])
        return images, labels
    if split != "train":
        raise DataError(
            f"split is {split} while targets is {targets}, of which there is one; leave split out."
        )
    return place, Path(targets).expanduser()


def _with_suffix(path: Path) -> Path:
    """Find a file of a folder, plain or with ``.gz``."""
    packed = path.with_name(f"{path.name}.gz")
    if path.exists():
        return path
    if packed.exists():
        return packed
    raise _missing(path)


def _missing(path: Path) -> DataError:
    if path.parent == Path(FASHION_MNIST):
        return DataError(
            f"{path}.gz is missing; install Fashion-MNIST with apt install dataset-fashion-mnist, "
            "or give path the folder of its files."
        )
    if path.parent.is_file():
        return DataError(
            f"{path.parent} is a file while targets is left out; name the file of its labels by "
            "targets, or give path the folder of both."
        )
    return DataError(f"{path} is missing, with .gz or without; give the folder of such files.")


def read_idx(path: Path) -> NDArray[Any]:
    """Read an IDX file: two zero bytes, number type, dimensions, their sizes, and the numbers.

    Sizes are unsigned and of 4 bytes; they and the numbers have the highest byte first.

    Args:
        path: The file, plain or gzip.

    Returns:
        Array of at least one dimension, in the byte order of this host.

    Raises:
        DataError: It is missing or damaged.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(_GZIP) else data
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; give the path of an IDX file.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; download or install it again.") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _TYPES or data[3] == 0:
        raise DataError(
            f"{path} begins with the bytes {data[:4].hex(' ') or 'of an empty file'}, which no IDX "
            "file does (00 00, a number type, the dimensions); give an IDX file, plain or gzip."
        )
    start = 4 + 4 * data[3]
    sizes = [int.from_bytes(data[at : at + 4], "big") for at in range(4, start, 4)]
    dtype = np.dtype(_TYPES[data[2]])
    expected = start + dtype.itemsize * math.prod(sizes)
    if len(data) != expected:
        raise DataError(
            f"{path} has {len(data)} bytes while its header says {expected}, for the shape "
            f"{tuple(sizes)}; download or install it again."
        )
    numbers = np.frombuffer(data, dtype, offset=start).reshape(sizes)
    return numbers.astype(dtype.newbyteorder("="))  # a copy: torch warns of read-only arrays
