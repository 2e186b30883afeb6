"""Placement of data in memory: on the host or on the accelerator (``data.device``).

Data sets whose batches are rows of arrays can live on the device, where a batch is one gather.
"""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import TensorDataset

from ddp_sgd.data.arrays import Arrays
from ddp_sgd.data.dataset_checks import has_epochs, may_give_whole_batches
from ddp_sgd.data.datasets import InMemory
from ddp_sgd.data.selection import Selection
from ddp_sgd.errors import ConfigError, Use, memory_for
from ddp_sgd.tree import leaves, map_leaves, tensors_in

_SHARE_OF_MEMORY = 4
"""``data.device: auto`` moves arrays to the device that fit into this part of its free memory."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an array, gathered by ``to``: where they are used, not where they are read.

    Args:
        array: Tensor of shape (n, ...).
        indices: int64 of shape (m,), on the same device; None takes all rows as they are.
        convert: Function from the rows to what the data set gives; None leaves them unchanged.
    """

    array: torch.Tensor
    indices: torch.Tensor | None
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None

    def to(self, device: torch.device) -> torch.Tensor:
        """Return the rows, of shape (m, ...), on a device; where the array is, nothing waits."""
        rows = self.array if self.indices is None else self.array.index_select(0, self.indices)
        rows = rows.to(device, non_blocking=True)
        return rows if self.convert is None else self.convert(rows)


class ArrayPair(NamedTuple):
    """The arrays of a data set whose batches are rows of them.

    Args:
        inputs: Tensor of shape (n, ...), or a tuple or mapping of such, all on one device.
        targets: The same, on the same device; None: there are no targets.
        convert: Function from rows of inputs to what the data set gives; None: just that.
    """

    inputs: Any
    targets: Any
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where the arrays are."""
        return next(tensors_in(self.inputs)).device

    @property
    def nbytes(self) -> int:
        """Size of the arrays, in bytes."""
        return sum(tensor.nbytes for tensor in tensors_in((self.inputs, self.targets)))

    def rows(self, indices: torch.Tensor) -> tuple[Any, Any]:
        """Return inputs and targets of a batch: each array as ``Rows`` of it.

        Args:
            indices: int64 of shape (m,), where the arrays are.
        """

        def row(array: torch.Tensor) -> Rows:
            return Rows(array, indices, self.convert)

        inputs = map_leaves(row, self.inputs)
        if self.targets is None:
            return inputs, None
        return inputs, map_leaves(lambda array: Rows(array, indices), self.targets)

    def to(self, device: torch.device) -> "ArrayPair":
        """Return the same arrays on a device."""

        def move(array: Any) -> Any:
            return None if array is None else array.to(device)

        return self._replace(
            inputs=map_leaves(move, self.inputs), targets=map_leaves(move, self.targets)
        )


def find_arrays(dataset: Any, selection: Selection | None = None) -> ArrayPair | None:
    """Find the arrays of a data set whose batches are rows of them; None for any other data set.

    ``TensorDataset`` and the data sets of this package are such, unless a subclass reads samples
    in its own way or changes with the epoch, and unless torch cannot gather rows of that number
    type.

    Args:
        dataset: Map-style data set.
        selection: Chooses input and target; None: samples are pairs.

    Raises:
        DataError: The data set lacks a part that is chosen.
    """
    if not may_give_whole_batches(dataset, in_pairs=selection is None) or has_epochs(dataset):
        return None
    convert = None
    if isinstance(dataset, TensorDataset):
        parts = dataset.tensors
    elif type(dataset).__getitems__ in (InMemory.__getitems__, Arrays.__getitems__):
        parts = _as_tensor(dataset.inputs), _as_tensor(dataset.targets)
        if type(dataset).__getitems__ is Arrays.__getitems__:
            if dataset.is_mapped and getattr(parts[1], "dtype", None) not in _TARGET_TYPES:
                return None
            convert = _conversion(dataset, parts[0])
    else:
        return None
    if convert is not None and selection is not None and selection.input != 0:
        return None  # bytes are scaled where they are the input, and nowhere else
    inputs, targets = selection(parts, "a sample") if selection else parts
    arrays = [array for _, array in leaves((inputs, targets)) if array is not None]
    is_sound = all(part is not None for part in parts) and all(map(_has_rows, arrays))
    if not is_sound or len({array.device for array in arrays}) > 1:
        return None
    return ArrayPair(inputs, targets, convert)


def scale_bytes(rows: torch.Tensor) -> torch.Tensor:
    """Turn bytes into float32 in [0, 1], with the bits that ``ddp_sgd.data.Arrays`` gives."""
    return rows.float() * (1 / 255)


def _as_tensor(part: Any) -> Any:
    if not isinstance(part, np.ndarray):
        return part
    with suppress(TypeError, ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an array that cannot be written is only read
        return torch.from_numpy(part)
    return None


_TARGET_TYPES = (torch.int64, torch.float32)
"""What ``Arrays`` gives as it is stored; other memory-mapped targets become one of these."""


def _conversion(dataset: Arrays, inputs: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what ``Arrays`` makes of rows of inputs; None if it gives them as they are stored."""
    dtype = getattr(inputs, "dtype", None)
    if dataset.is_mapped:
        return None if dtype in (torch.uint8, torch.float32) else torch.Tensor.float
    return scale_bytes if dtype == torch.uint8 else None


_ROW_TYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
}
"""Number types whose rows torch gathers on any device."""


def _has_rows(part: Any) -> bool:
    return is_plain(part) and part.ndim > 0 and part.dtype in _ROW_TYPES


def is_plain(leaf: Any) -> bool:
    """Whether a leaf is a tensor that is a piece of memory, and nothing besides."""
    return (
        type(leaf) is torch.Tensor
        and leaf.layout is torch.strided
        and not (leaf.requires_grad or leaf.is_quantized or leaf.is_conj() or leaf.is_neg())
    )


def choose_arrays(  # noqa: PLR0913  # a data set, how it is read, and what there is room for
    dataset: Any,
    where: str,
    *,
    wanted: str,
    device: torch.device,
    workers: int,
    collate: Any,
    sharing: int,
    selection: Selection | None = None,
) -> ArrayPair | None:
    """Choose where the arrays of a data set live, and move them there.

    Args:
        dataset: Map-style data set.
        where: Its key in the configuration, for errors.
        wanted: ``data.device``: ``auto`` moves what fits into a quarter of the free memory of the
            device, divided by the ranks that share it; ``host``; ``accelerator``.
        device: Where the rank computes.
        workers: Loader processes.
        collate: Function from a list of samples to a batch, or None.
        sharing: Ranks that share the device.
        selection: Chooses input and target of a sample; None: samples are pairs.

    Returns:
        The arrays, on the host or on the device; None for data that are read otherwise.

    Raises:
        ConfigError: The data set has to be on an accelerator and cannot be, or does not fit.
    """
    arrays = None if workers or collate else find_arrays(dataset, selection)
    reason = _why_not_on(device, arrays, where, workers, collate)
    if wanted == "accelerator" and reason:
        raise ConfigError(f"data.device is accelerator while {reason}, or data.device=auto.")
    if device.type != "cuda" or arrays is None:
        return None
    if arrays.device.type != "cpu" or wanted == "host":
        return arrays if arrays.device in (device, torch.device("cpu")) else None
    share = torch.cuda.mem_get_info(device)[0] // (_SHARE_OF_MEMORY * sharing)
    if wanted == "auto" and arrays.nbytes > share:
        return arrays
    with memory_for(Use.DATA_ON_DEVICE, where):
        return arrays.to(device)


def _why_not_on(
    device: torch.device, arrays: ArrayPair | None, where: str, workers: int, collate: Any
) -> str | None:
    """Return why a data set cannot be on the accelerator, and what to set; None if it can."""
    if device.type != "cuda":
        return f"the run computes on the {device.type}; set runtime.device=cuda"
    if workers:
        return f"data.workers is {workers}; set data.workers=0"
    if collate is not None:
        return "data.collate names a function, which gets samples; leave that out"
    if arrays is None:
        return (
            f"{where} is read by methods of its own; name a torch.utils.data.TensorDataset of "
            "inputs and targets, ddp_sgd.data.InMemory or ddp_sgd.data.Arrays"
        )
    return None
