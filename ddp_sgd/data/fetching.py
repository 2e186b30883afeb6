"""One batch out of a map-style data set: whole where the set can, else sample by sample."""

import random
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset, default_collate

from ddp_sgd.errors import DataError, UserError
from ddp_sgd.seeds import seed_for

EVAL_EPOCH = -1
"""Stands for the epoch where samples are read for evaluation, so that they always come out
alike.
"""


AHEAD_BYTES = 1 << 18
"""Batches that are read together: what fits into the cache of a core, with room for others."""

_LINE_BYTES = 64


class Request(NamedTuple):
    """What a loader asks for. The epoch travels along, since loader processes outlive epochs.

    Args:
        epoch: Number of the epoch, or ``EVAL_EPOCH``.
        indices: Samples of the batch, int64 of shape (m,), at least one.
    """

    epoch: int
    indices: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Takes the place of a batch that could not be read: exceptions do not travel on one line."""

    message: str


class Fetcher:
    """Reads requests from a data set, with random numbers that depend on (seed, epoch, index) only.

    A data set whose ``__getitems__`` returns a pair of stacked arrays or tensors is read a whole
    batch at a time, and seeded by the first index of the batch; any other is read, seeded and
    collated sample by sample, so that neither loader processes, nor ranks, nor a restart change an
    augmentation.

    Args:
        dataset: Map-style data set of (input, target).
        where: Its key in the configuration, for errors.
        seed: Seed of the run.
    """

    def __init__(self, dataset: Any, where: str, seed: int) -> None:
        self._dataset = dataset
        self._where = where
        self._seed = seed
        self._read = self._choose_reader()

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, request: Request) -> Any:
        """Return (inputs, targets) as tensors, or containers of such; ``Unreadable`` on a fault."""
        try:
            return self._read(request)
        except Exception as error:  # whatever a user's data set raises
            return Unreadable(self._describe(error, request))

    def read_ahead(self, requests: Sequence[Request]) -> list[Any]:
        """Read several batches of one epoch, by one call where that gives the same.

        Args:
            requests: What is asked for, in order.

        Returns:
            For each request what ``__getitems__`` gives; a fault is that of its own batch.
        """
        if len(requests) > 1 and self.reads_plainly:
            indices = np.concatenate([request.indices for request in requests])
            whole = self.__getitems__(Request(requests[0].epoch, indices))
            if not isinstance(whole, Unreadable):
                sizes = [len(request.indices) for request in requests]
                parts = [[aligned(batch) for batch in part.split(sizes)] for part in whole]
                return list(zip(*parts, strict=True))
        return [self.__getitems__(request) for request in requests]

    @property
    def reads_plainly(self) -> bool:
        """Whether a batch is rows of tensors, whatever else is read with it."""
        return self._read in (self._read_own, self._read_tensors)

    def _choose_reader(self) -> Callable[[Request], Any]:
        if not _gives_whole_batches(self._dataset):
            return self._read_one_by_one
        if isinstance(self._dataset, TensorDataset):
            return self._read_tensors
        return self._read_drawing if _draws_numbers(self._dataset) else self._read_own

    def _read_tensors(self, request: Request) -> Any:
        rows = torch.from_numpy(request.indices)
        return tuple(tensor.index_select(0, rows) for tensor in self._dataset.tensors)

    def _read_own(self, request: Request) -> Any:
        inputs, targets = self._dataset.__getitems__(request.indices)
        return _to_tensor(inputs), _to_tensor(targets)

    def _read_drawing(self, request: Request) -> Any:
        indices = request.indices.tolist()
        _seed_everything(seed_for("sample", self._seed, request.epoch, indices[0]))
        return tuple(_to_tensor(part) for part in self._dataset.__getitems__(indices))

    def _read_one_by_one(self, request: Request) -> Any:
        indices = request.indices.tolist()
        return default_collate([self._read_sample(request.epoch, index) for index in indices])

    def _read_sample(self, epoch: int, index: int) -> Any:
        _seed_everything(seed_for("sample", self._seed, epoch, index))
        try:
            sample = self._dataset[index]
        except UserError:
            raise
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{self._where}[{index}] cannot be read, {cause}; mend or remove that sample."
            ) from error
        if not (isinstance(sample, (tuple, list)) and len(sample) == 2):
            raise DataError(
                f"{self._where}[{index}] is {_shape_of(sample)}, not (input, target); wrap the "
                "data set in ddp_sgd.data.Columns, or return a pair."
            )
        return sample

    def _describe(self, error: Exception, request: Request) -> str:
        if isinstance(error, UserError):
            return str(error)
        first = request.indices[0]
        return (
            f"{self._where} gave samples that do not form a batch (from index {first} on), "
            f"{type(error).__name__}: {error}; give all samples the same shapes and number types."
        )


def _gives_whole_batches(dataset: Any) -> bool:
    kind = type(dataset)
    if isinstance(dataset, TensorDataset):  # unless a subclass reads its samples differently
        return kind.__getitem__ is TensorDataset.__getitem__ and len(dataset.tensors) == 2
    if not hasattr(kind, "__getitems__") or len(dataset) == 0:
        return False
    # Of two methods the more derived one says how samples are read.
    order = {name: _depth(kind, name) for name in ("__getitem__", "__getitems__")}
    if order["__getitem__"] < order["__getitems__"]:
        return False
    if not _draws_numbers(dataset):
        return True
    try:
        batch = dataset.__getitems__([0])
    except Exception:  # reading sample by sample finds the same fault, and names the index
        return False
    return isinstance(batch, tuple) and len(batch) == 2 and all(isinstance(p, Sized) for p in batch)


def _depth(kind: type, method: str) -> int:
    """How many classes up from its own a method is defined."""
    return next(
        (d for d, each in enumerate(kind.__mro__) if method in vars(each)), len(kind.__mro__)
    )


def _draws_numbers(dataset: Any) -> bool:
    """Whether reading a batch may draw random numbers; the data sets of this package do not."""
    return not type(dataset).__getitems__.__module__.startswith("ddp_sgd.data.")


def _to_tensor(part: Any) -> Any:
    return aligned(torch.from_numpy(part)) if isinstance(part, np.ndarray) else part


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a small tensor that begins elsewhere than torch's own do.

    Products of matrices may round differently then, and where a batch begins must not depend on
    what was read before it. Large ones are read one by one, and stay where they are.
    """
    if tensor.nbytes > AHEAD_BYTES or tensor.data_ptr() % _LINE_BYTES == 0:
        return tensor
    return tensor.clone()


def _seed_everything(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFF_FFFF)  # augmentations draw from the global one


def _shape_of(sample: Any) -> str:
    if isinstance(sample, dict):
        return f"a mapping with {', '.join(map(str, sample))}"
    if isinstance(sample, (tuple, list)):
        return f"a {type(sample).__name__} of {len(sample)}"
    return f"a {type(sample).__name__}"
