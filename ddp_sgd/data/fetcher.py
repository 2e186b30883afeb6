"""Fetcher: one batch of a map-style data set, by ``__getitems__`` or sample by sample."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset, default_collate

from ddp_sgd.data.dataset_checks import (
    draws_numbers,
    gives_whole_batches,
    has_epochs,
    is_list,
    is_pair,
    may_give_whole_batches,
    no_batch,
    no_pair,
    no_tensor,
    require_rows,
    shape_of,
    single,
    take_whole_batch,
)
from ddp_sgd.data.selection import Selection
from ddp_sgd.errors import DataError, UserError
from ddp_sgd.seeds import ReadingRandomness, seed_for
from ddp_sgd.tree import map_leaves

Collate = Callable[[list[Any]], Any]
"""Forms a batch (inputs, targets) of a list of samples."""

EVAL_EPOCH = -1
"""Stands for the epoch where samples are read for evaluation, so that they always come out
alike.
"""


AHEAD_BYTES = 1 << 18
"""Batches that are read together: what fits into the cache of a core, with room for others."""

_MOST_IN_A_ROW = 8
"""Batches of a user's own that are read together, if small: each may take long to make."""

_LINE_BYTES = 64


class Request(NamedTuple):
    """Request of a loader. The epoch travels along, since loader processes outlive epochs.

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
    augmentation. A collate function of the user's is seeded by the first index of the batch.

    A training set with a method ``set_epoch`` has it called before the first read of an epoch, in
    each process that reads. What is read before the run, to check the data, is that of epoch 0,
    also where a run goes on in a later one: whole and resumed runs find the same.

    Args:
        dataset: Map-style data set of (input, target); with a collate function, of anything.
        where: Its key in the configuration, for errors.
        seed: Seed of the run.
        collate: Function from a list of samples to a batch (inputs, targets); samples are then
            read one by one. None: torch's default_collate.
        selection: Chooses input and target of a sample, or of a whole batch; None: they are pairs.

    Attributes:
        where: Key of the data set in the configuration.
        seed: Seed of the run.
    """

    def __init__(
        self,
        dataset: Any,
        where: str,
        seed: int,
        collate: Collate | None = None,
        selection: Selection | None = None,
    ) -> None:
        self._dataset = dataset
        self.where = where
        self.seed = seed
        self._collate = collate
        self._selection = selection
        self._has_target = selection is None or selection.has_target
        self._follows_epochs = where == "data.train" and has_epochs(dataset)
        self._begun: tuple[int, int] | None = None
        self._fault = ""
        # A collate function may change the samples, so that it cannot be called a second time.
        self._randomness = ReadingRandomness(seeds_all=collate is not None)
        try:
            self._read = self._choose_reader()
        except UserError as error:  # found by the first read, as all that a data set does wrong
            self._fault = str(error)
            self._read = self._refuse

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitems__(self, request: Request) -> Any:
        """Return (inputs, targets) as tensors, or containers of such; ``Unreadable`` on a fault."""
        try:
            if self._follows_epochs:
                self._begin_epoch(request.epoch)
            return self._read(request)
        except Exception as error:  # any error of a user's data set
            return Unreadable(self._describe(error, request))

    def read_with_singles(self, request: Request) -> tuple[Any, list[Any]] | Unreadable:
        """Read a batch, and make a batch of each of its samples from the same reading.

        Args:
            request: What to read.

        Returns:
            The batch, and the batches of one sample, in order; ``Unreadable`` on a fault, which
            includes that single samples form no batch.
        """
        try:
            if self._follows_epochs:
                self._begin_epoch(request.epoch)
            if self._read == self._read_one_by_one:
                return self._read_both(request)
            batch = self._read(request)
            rows = range(len(request.indices))
            return batch, [tuple(single(part, n) for part in batch) for n in rows]
        except Exception as error:  # any error of a user's data set
            return Unreadable(self._describe(error, request))

    def read_ahead(self, requests: Sequence[Request]) -> list[Any]:
        """Read several batches of one epoch, by one call where that gives the same.

        Args:
            requests: What to read, in order.

        Returns:
            For each request what ``__getitems__`` gives; a fault is that of its own batch.
        """
        if len(requests) > 1 and self.reads_plainly:
            indices = np.concatenate([request.indices for request in requests])
            whole = self.__getitems__(Request(requests[0].epoch, indices))
            if not isinstance(whole, Unreadable):
                sizes = [len(request.indices) for request in requests]
                return list(zip(*(_split(part, sizes) for part in whole), strict=True))
        return [self.__getitems__(request) for request in requests]

    @property
    def most_at_once(self) -> int:
        """Most batches to read before the first of them is used.

        Whole batches of a user's own are seeded and read one by one, but in a row: after a step of
        the model, their code is no longer in the cache of the core.
        """
        if self.reads_plainly:
            return AHEAD_BYTES
        return _MOST_IN_A_ROW if self._read == self._read_drawing else 1

    @property
    def reads_plainly(self) -> bool:
        """Whether a batch is rows of tensors, alone or with other data."""
        return self._read in (self._read_own, self._read_tensors)

    def _choose_reader(self) -> Callable[[Request], Any]:
        in_pairs = self._selection is None
        if self._collate is not None or not may_give_whole_batches(
            self._dataset, in_pairs=in_pairs
        ):
            return self._read_one_by_one
        if isinstance(self._dataset, TensorDataset):
            return self._read_tensors
        if not draws_numbers(self._dataset):
            return self._read_own
        if self._follows_epochs:
            self._begin_epoch(EVAL_EPOCH)
        seed = seed_for("sample", self.seed, EVAL_EPOCH, 0)
        try_one = partial(gives_whole_batches, self._dataset, self.where, self._selection)
        whole = self._randomness.read(seed, try_one)
        return self._read_drawing if whole else self._read_one_by_one

    def _begin_epoch(self, epoch: int) -> None:
        """Call ``set_epoch`` of the data set, if this process has not done so for this epoch."""
        epoch = max(epoch, 0)  # of a check before the run
        if self._begun == (os.getpid(), epoch):
            return
        seed = seed_for("epoch", self.seed, epoch)
        try:
            self._randomness.read(seed, partial(self._dataset.set_epoch, epoch))
        except UserError:
            raise
        except Exception as error:  # any error of a user's data set
            raise DataError(
                f"{self.where}.set_epoch fails for epoch {epoch}, {type(error).__name__}: {error}; "
                "let it take the number of an epoch, from 0, or rename it."
            ) from error
        self._begun = os.getpid(), epoch

    def _refuse(self, _: Request) -> Any:
        raise DataError(self._fault)

    def _read_tensors(self, request: Request) -> Any:
        rows = torch.from_numpy(request.indices)
        tensors = self._dataset.tensors  # which may be on a device
        if self._selection is None:
            return tuple(tensor.index_select(0, rows.to(tensor.device)) for tensor in tensors)

        def take(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.index_select(0, rows.to(tensor.device))

        inputs, targets = self._selection(tensors, f"a sample of {self.where}")
        return map_leaves(take, inputs), map_leaves(take, targets) if self._has_target else None

    def _read_own(self, request: Request) -> Any:
        batch = self._dataset.__getitems__(request.indices)
        if self._selection is None:
            inputs, targets = batch
            return self._to_tensor(inputs), self._to_tensor(targets)
        inputs, targets = self._selection(batch, f"a sample of {self.where}")
        return map_leaves(self._to_tensor, inputs), map_leaves(self._to_tensor, targets)

    def _read_drawing(self, request: Request) -> Any:
        indices = request.indices.tolist()
        seed = seed_for("sample", self.seed, request.epoch, indices[0])

        def read() -> Any:
            return take_whole_batch(self._dataset, indices.copy(), self.where)

        batch = self._randomness.read(seed, read)
        if self._selection is not None:
            batch = self._selection(batch, f"a batch of {self.where}")
        require_rows(batch, indices, self.where, has_targets=self._has_target)
        inputs, targets = batch
        return self._to_tensors(inputs), self._to_tensors(targets)

    def _read_one_by_one(self, request: Request) -> Any:
        samples, indices = self._read_samples(request)
        return self._form_batch(samples, request.epoch, indices)

    def _read_both(self, request: Request) -> tuple[Any, list[Any]]:
        samples, indices = self._read_samples(request)
        copies = [_copy(sample) for sample in samples]  # a collate function may change samples
        batch = self._form_batch(samples, request.epoch, indices)
        pairs = zip(copies, indices, strict=True)
        return batch, [self._form_batch([each], request.epoch, [index]) for each, index in pairs]

    def _read_samples(self, request: Request) -> tuple[list[Any], list[int]]:
        indices = request.indices.tolist()
        return [self._read_sample(request.epoch, index) for index in indices], indices

    def _read_sample(self, epoch: int, index: int) -> Any:
        try:
            seed = seed_for("sample", self.seed, epoch, index)
            sample = self._randomness.read(seed, partial(self._take, index))
        except UserError:
            raise
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{self.where}[{index}] cannot be read, {cause}; fix or remove that sample."
            ) from error
        if self._selection is not None:
            return self._selection(sample, f"{self.where}[{index}]")
        if self._collate is None and not is_pair(sample):
            raise DataError(no_pair(sample, self.where, index))
        return sample

    def _take(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except NotImplementedError:  # torch needs only lists of samples, from one method
            if not hasattr(self._dataset, "__getitems__"):
                raise
            return self._dataset.__getitems__([index])[0]

    def _form_batch(self, samples: list[Any], epoch: int, indices: list[int]) -> Any:
        if self._collate is not None:
            self._randomness.seed(seed_for("collate", self.seed, epoch, indices[0]))
            return _apply(self._collate, samples, self.where, indices)
        if not self._has_target:
            samples = [(each,) for each, _ in samples]
        try:
            inputs, *targets = default_collate(samples)
            batch = inputs, targets[0] if targets else None
            return batch if self._selection is None else self._selection.restore(*batch)
        except Exception as error:
            raise DataError(no_batch(samples, self.where, indices, error)) from error

    def _to_tensors(self, part: Any) -> Any:
        """Turn the arrays of a part into tensors; a list has one entry per sample, and stays."""
        if isinstance(part, np.ndarray | torch.Tensor):  # most are: without the search below
            return self._to_tensor(part)
        return map_leaves(self._to_tensor, part, is_leaf=is_list)

    def _to_tensor(self, part: Any) -> Any:
        if not isinstance(part, np.ndarray):
            return part
        try:
            return aligned(torch.from_numpy(part))
        except (TypeError, ValueError) as error:
            raise DataError(no_tensor(part, self.where, error)) from error

    def _describe(self, error: Exception, request: Request) -> str:
        if isinstance(error, UserError):
            return str(error)
        first = request.indices[0]
        return (
            f"{self.where} gave samples that do not form a batch (from index {first} on), "
            f"{type(error).__name__}: {error}; give all samples the same shapes and number types."
        )


def _split(part: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut rows of tensors into batches; of no targets, each has none."""
    if isinstance(part, torch.Tensor):
        return [aligned(batch) for batch in torch.split(part, list(sizes))]
    if isinstance(part, dict):
        columns = zip(*(_split(each, sizes) for each in part.values()), strict=True)
        return [dict(zip(part, column, strict=True)) for column in columns]
    if isinstance(part, tuple):
        return list(zip(*(_split(each, sizes) for each in part), strict=True))
    return [None] * len(sizes)


def _apply(collate: Collate, samples: list[Any], where: str, indices: list[int]) -> Any:
    """Form a batch by a function of the user's.

    Raises:
        DataError: It fails, or gives no pair.
    """
    count = len(samples)
    shown = f"{where}[{indices[0]}] alone" if count == 1 else f"{count} samples of {where}"
    name = getattr(collate, "__qualname__", type(collate).__name__)
    try:
        batch = collate(samples)
    except UserError:
        raise
    except Exception as error:  # any error of a user's function
        raise DataError(
            f"data.collate is {name}, which fails for {shown}, {type(error).__name__}: {error}; "
            "let it take lists of any length, since ranks also read single samples, and leave the "
            "samples unchanged."
        ) from error
    if not is_pair(batch):
        raise DataError(
            f"data.collate is {name}, which gives {shape_of(batch)} for {shown}, not (inputs, "
            "targets); return a pair."
        )
    return batch


def _copy(sample: Any) -> Any:
    try:
        return copy.deepcopy(sample)
    except Exception:  # what cannot be copied, such as a tensor with a history, is shared
        return sample


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a small tensor that begins elsewhere than torch's own do.

    Products of matrices may round differently then, and where a batch begins must not depend on
    what was read before it. Large ones are read one by one, and stay where they are.
    """
    if tensor.nbytes > AHEAD_BYTES or tensor.data_ptr() % _LINE_BYTES == 0:
        return tensor
    return tensor.clone()
