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
from ddp_sgd.data.dataset_checks import may_give_whole_batches
from ddp_sgd.data.datasets import InMemory
from ddp_sgd.errors import ConfigError, Use, memory_for

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
        inputs: Tensor of shape (n, ...).
        targets: Tensor of shape (n, ...), on the same device.
        convert: Function from rows of inputs to what the data set gives; None: just that.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    convert: Callable[[torch.Tensor], torch.Tensor] | None = None

    def rows(self, indices: torch.Tensor) -> tuple[Rows, Rows]:
        """Return inputs and targets of a batch.

        Args:
            indices: int64 of shape (m,), where the arrays are.
        """
        return Rows(self.inputs, indices, self.convert), Rows(self.targets, indices)

    def to(self, device: torch.device) -> "ArrayPair":
        """Return the same arrays on a device."""
        return self._replace(inputs=self.inputs.to(device), targets=self.targets.to(device))


def find_arrays(dataset: Any) -> ArrayPair | None:
    """Find the arrays of a data set whose batches are rows of them; None for any other data set.

    ``TensorDataset`` and the data sets of this package are such, unless a subclass reads samples
    in its own way, and unless torch cannot gather rows of that number type.
    """
    if not may_give_whole_batches(dataset):
        return None
    convert = None
    if isinstance(dataset, TensorDataset):
        inputs, targets = dataset.tensors
    elif type(dataset).__getitems__ in (InMemory.__getitems__, Arrays.__getitems__):
        inputs, targets = _as_tensor(dataset.inputs), _as_tensor(dataset.targets)
        if type(dataset).__getitems__ is Arrays.__getitems__:
            if dataset.is_mapped and getattr(targets, "dtype", None) not in _TARGET_TYPES:
                return None
            convert = _conversion(dataset, inputs)
    else:
        return None
    is_sound = _has_rows(inputs) and _has_rows(targets) and inputs.device == targets.device
    return ArrayPair(inputs, targets, convert) if is_sound else None


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


def choose_arrays(
    dataset: Any,
    where: str,
    *,
    wanted: str,
    device: torch.device,
    workers: int,
    collate: Any,
    sharing: int,
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

    Returns:
        The arrays, on the host or on the device; None for data that are read otherwise.

    Raises:
        ConfigError: The data set has to be on an accelerator and cannot be, or does not fit.
    """
    arrays = None if workers or collate else find_arrays(dataset)
    reason = _why_not_on(device, arrays, where, workers, collate)
    if wanted == "accelerator" and reason:
        raise ConfigError(f"data.device is accelerator while {reason}, or data.device=auto.")
    if device.type != "cuda" or arrays is None:
        return None
    if arrays.inputs.device.type != "cpu" or wanted == "host":
        return arrays if arrays.inputs.device in (device, torch.device("cpu")) else None
    share = torch.cuda.mem_get_info(device)[0] // (_SHARE_OF_MEMORY * sharing)
    if wanted == "auto" and arrays.inputs.nbytes + arrays.targets.nbytes > share:
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
