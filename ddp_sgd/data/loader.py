"""Data loaders: batches from the data set, in workers or not, to the device."""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from ddp_sgd.data.augment import NO_TRANSFORMS, Transforms
from ddp_sgd.data.device import (
    Place,
    Prefetcher,
    Transfer,
    move,
    open_transfer,
    prefetch_rows,
)
from ddp_sgd.data.draws import Indices, Number
from ddp_sgd.data.fetcher import (
    EVAL_EPOCH,
    Collate,
    Fetcher,
    Request,
    Unreadable,
)
from ddp_sgd.data.placement import ArrayPair, Rows
from ddp_sgd.data.read_ahead import InProcess
from ddp_sgd.data.sampler import EvalSampler, TrainSampler
from ddp_sgd.data.selection import Selection
from ddp_sgd.data.workers import (
    Departure,
    flag_of_leaving,
    leave_signals_to_the_rank,
    start_method,
    start_workers,
)
from ddp_sgd.errors import DataError, lost_worker
from ddp_sgd.seeds import seed_for
from ddp_sgd.tree import leaves

_BLOCK = 64
"""Batches whose indices are copied to the device together, at least."""

_UNKNOWN = np.empty(0, np.int64)


class MicroBatch(NamedTuple):
    """What one rank sends through the model at once.

    Args:
        inputs: Tensor of shape (m, ...), ``Rows`` that become one, or a container of such.
        targets: The same; None: there are no targets.
        samples: True number of samples in it, m; 0 for a dummy, whose loss counts for nothing.
        is_last: Whether it ends this rank's part of the step.
        epoch: Number of the epoch.
        indices: Which samples it holds, of shape (m,), those of a dummy included.
    """

    inputs: Any
    targets: Any
    samples: int
    is_last: bool
    epoch: Number = 0
    indices: Indices = _UNKNOWN

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same batch on a device, as tensors; nothing is copied that is there."""
        if device.type == "cpu":
            return self
        inputs, targets = move(self.inputs, device), move(self.targets, device)
        return self._replace(inputs=inputs, targets=targets)


class StepBatches(NamedTuple):
    """What one rank computes in one step.

    Args:
        step: Number of the step in the run, from 0.
        samples: Samples in the step, over all ranks, N.
        micro_batches: This rank's part, at least one.
        transforms: Applied to the inputs once they are on the device.
    """

    step: int
    samples: int
    micro_batches: tuple[MicroBatch, ...]
    transforms: Transforms = NO_TRANSFORMS


class TrainLoader:
    """The training set in the order of the run, one step at a time.

    Args:
        dataset: Map-style data set of (input, target).
        sampler: Which samples this rank reads.
        epochs: Passes over the data that are begun.
        workers: Loader processes; 0 reads in this process.
        device: Where the batches go.
        collate: Function from a list of samples to a batch; None: torch's default_collate.
        transforms: Applied to the inputs by those who bring them to the device.
        arrays: The arrays of the data set, on the host or the device, if batches are rows of them.
        selection: Chooses input and target of a sample; None: samples are pairs.
        total_steps: Steps of the run, if it ends in the middle of an epoch; None: it does not.
    """

    def __init__(  # noqa: PLR0913  # a data set, and how it is read
        self,
        dataset: Any,
        sampler: TrainSampler,
        *,
        epochs: int,
        workers: int,
        device: torch.device,
        collate: Collate | None = None,
        transforms: Transforms = NO_TRANSFORMS,
        arrays: ArrayPair | None = None,
        selection: Selection | None = None,
        total_steps: int | None = None,
    ) -> None:
        self._sampler = sampler
        self._epochs = epochs
        self._total_steps = total_steps or epochs * sampler.steps_per_epoch
        self._transforms = transforms
        fetcher = Fetcher(dataset, "data.train", sampler.seed, collate, selection)
        self._requests = _Requests(sampler)
        transfer = open_transfer(device)
        self._batches = _build_batches(fetcher, self._requests, workers, arrays, transfer)
        self._prefetcher = None
        if transfer is not None and not _is_on_device(arrays):
            self._prefetcher = Prefetcher(transfer)

    def from_step(self, step: int, skip: int = 0) -> Iterator[StepBatches]:
        """Yield what this rank computes in each step, to the end of the run.

        Batches are on the host if that computes, and on the device otherwise; there a batch keeps
        its values until the step after the next one is asked for.

        Args:
            step: Number of the first step, from 0.
            skip: Samples at the head of that step that were trained already.

        Raises:
            DataError: A sample cannot be read.
        """
        first_epoch, first_step = divmod(step, self._sampler.steps_per_epoch)
        for epoch in range(first_epoch, self._epochs):
            stop_step = self._total_steps - epoch * self._sampler.steps_per_epoch
            self._sampler.set_epoch(epoch, first_step, skip, stop_step)
            steps = self._read_epoch(epoch, step)
            yield from self._prefetcher.run(steps, _place_step) if self._prefetcher else steps
            step += self._sampler.steps_per_epoch - first_step
            first_step = skip = 0

    def read_ahead(self) -> None:
        """Read the next batch now, after a step was launched, if the device can compute meanwhile.

        Nothing is read beyond the end of an epoch. An error waits until that batch is asked for.
        """
        if self._prefetcher is not None:
            self._prefetcher.read_ahead()

    def _read_epoch(self, epoch: int, step: int) -> Iterator[StepBatches]:
        micro_batches: list[MicroBatch] = []
        for inputs, targets in _read(self._batches):
            drawn = self._requests.pending.popleft()
            size, is_last, indices = drawn.size, drawn.is_last, _indices_of(inputs, drawn.indices)
            micro_batches.append(MicroBatch(inputs, targets, size, is_last, epoch, indices))
            if drawn.is_last:
                batches = tuple(micro_batches)
                yield StepBatches(step, drawn.step_samples, batches, self._transforms)
                micro_batches.clear()
                step += 1


def _indices_of(inputs: Any, indices: NDArray[np.int64]) -> Indices:
    """Return the indices of a batch where its rows are gathered."""
    first = inputs
    if not isinstance(inputs, (torch.Tensor, Rows)):
        first = next((leaf for _, leaf in leaves(inputs)), None)
    if isinstance(first, Rows) and first.indices is not None and first.indices.is_cuda:
        return first.indices
    return indices


def _place_step(batches: StepBatches, place: Place) -> StepBatches:
    """Copy the micro-batches of a step to the device, with their indices if these are used."""
    placed = [
        batch._replace(inputs=place(batch.inputs), targets=place(batch.targets))
        for batch in batches.micro_batches
    ]
    if len(batches.transforms):
        placed = [each._replace(indices=place(torch.as_tensor(each.indices))) for each in placed]
    return batches._replace(micro_batches=tuple(placed))


_Chunk = tuple[int, int, Any, Any]


class EvalLoader:
    """A held-out set in chunks that do not depend on the number of ranks.

    Args:
        dataset: Map-style data set of (input, target).
        chunks: Which chunks this rank reads.
        seed: Seed of the run.
        workers: Loader processes; 0 reads in this process.
        device: Where the batches go.
        collate: Function from a list of samples to a batch; None: torch's default_collate.
        transforms: Applied to the inputs by those who bring them to the device.
        arrays: The arrays of the data set, on the host or the device, if batches are rows of them.
        selection: Chooses input and target of a sample; None: samples are pairs.
        where: Key of the data set, for errors.
    """

    def __init__(  # noqa: PLR0913  # a data set, and how it is read
        self,
        dataset: Any,
        chunks: EvalSampler,
        *,
        seed: int,
        workers: int,
        device: torch.device,
        collate: Collate | None = None,
        transforms: Transforms = NO_TRANSFORMS,
        arrays: ArrayPair | None = None,
        selection: Selection | None = None,
        where: str = "data.eval",
    ) -> None:
        self.chunks = chunks
        self._transforms = transforms
        fetcher = Fetcher(dataset, where, seed, collate, selection)
        self._requests = _Requests(chunks)
        transfer = open_transfer(device)
        self._batches = _build_batches(fetcher, self._requests, workers, arrays, transfer)
        self._transfer = None if _is_on_device(arrays) else transfer

    def __iter__(self) -> Iterator[_Chunk]:
        """Yield (number of the chunk, its samples, inputs, targets), as ``TrainLoader`` does."""
        if self._transfer is None:
            return self._read_chunks()
        return Prefetcher(self._transfer).run(self._read_chunks(), _place_chunk)

    def _read_chunks(self) -> Iterator[_Chunk]:
        for inputs, targets in _read(self._batches):
            drawn = self._requests.pending.popleft()
            yield drawn.number, drawn.size, inputs, targets

    def transform(self, inputs: Any, number: int) -> Any:
        """Apply the transforms to the inputs of a chunk, which are on the device.

        Args:
            inputs: Inputs of the chunk.
            number: Number of the chunk.
        """
        if not len(self._transforms):
            return inputs
        return self._transforms(inputs, self.chunks.indices(number), EVAL_EPOCH)


def _place_chunk(chunk: _Chunk, place: Place) -> _Chunk:
    """Copy a chunk to the device."""
    number, samples, inputs, targets = chunk
    return number, samples, place(inputs), place(targets)


class _Requests:
    """What a sampler draws, as requests to a ``Fetcher``; DataLoader's batch sampler.

    Attributes:
        pending: What was drawn, and not read yet, in order.
    """

    def __init__(self, sampler: TrainSampler | EvalSampler) -> None:
        self._sampler = sampler
        self.pending: deque[Any] = deque()

    def __iter__(self) -> Iterator[Request]:
        self.pending.clear()  # of an iteration that was left in the middle
        epoch = self._sampler.epoch if isinstance(self._sampler, TrainSampler) else EVAL_EPOCH
        for drawn in self._sampler:
            self.pending.append(drawn)
            yield Request(epoch, drawn.indices)

    def __len__(self) -> int:
        return len(self._sampler)

    def in_blocks(self) -> Iterator[list[NDArray[np.int64]]]:
        """Yield the indices of many batches at a time, of whole steps."""
        block: list[NDArray[np.int64]] = []
        for request in self:
            block.append(request.indices)
            if len(block) >= _BLOCK and getattr(self.pending[-1], "is_last", True):
                yield block
                block = []
        if block:
            yield block


class _InArrays:
    """Batches as rows of arrays, which are gathered later: by the device, or on the way to it."""

    def __init__(self, arrays: ArrayPair, requests: _Requests, transfer: Transfer) -> None:
        self._arrays = arrays
        self._requests = requests
        self._transfer = transfer

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if _is_on_device(self._arrays):
            yield from prefetch_rows(self._arrays, self._requests.in_blocks(), self._transfer)
            return
        for request in self._requests:
            yield self._arrays.rows(torch.from_numpy(request.indices))


def _is_on_device(arrays: ArrayPair | None) -> bool:
    return arrays is not None and arrays.device.type != "cpu"


def _read(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (inputs, targets); raise where a batch could not be read."""
    try:
        for batch in start_workers(batches):
            if isinstance(batch, Unreadable):
                raise DataError(batch.message)
            inputs, targets = batch
            yield inputs, targets
    except (RuntimeError, OSError, EOFError) as error:
        if lost := lost_worker(error):
            raise lost from error
        raise


def _build_batches(
    fetcher: Fetcher,
    requests: _Requests,
    workers: int,
    arrays: ArrayPair | None,
    transfer: Transfer | None,
) -> Iterable[Any]:
    if arrays is not None and transfer is not None:
        return _InArrays(arrays, requests, transfer)
    if workers == 0:
        return InProcess(fetcher, requests)
    return DataLoader(
        fetcher,  # type: ignore[arg-type]  # torch types data sets by class, not by methods
        batch_sampler=requests,  # type: ignore[arg-type]  # torch types it as lists of indices
        num_workers=workers,
        collate_fn=Departure(workers, fetcher.where),
        multiprocessing_context=start_method(),
        pin_memory=transfer is not None and transfer.device.type != "cpu",
        persistent_workers=True,
        worker_init_fn=partial(leave_signals_to_the_rank, flag_of_leaving()),
        # Its own: making an iterator draws a number, and the global generator is the model's.
        generator=torch.Generator().manual_seed(seed_for("loader", fetcher.seed)),
    )
