"""Data loaders: batches from the data set, in workers or not, to the device."""

import atexit
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from ddp_sgd.data.device import (
    Place,
    Prefetcher,
    Transfer,
    move,
    open_transfer,
    prefetch_rows,
)
from ddp_sgd.data.fetcher import (
    EVAL_EPOCH,
    Collate,
    Fetcher,
    InProcess,
    Request,
    Unreadable,
)
from ddp_sgd.data.placement import ArrayPair, Rows
from ddp_sgd.data.sampler import EvalSampler, TrainSampler
from ddp_sgd.errors import DataError
from ddp_sgd.seeds import seed_for
from ddp_sgd.torch_errors import lost_worker

_BLOCK = 64
"""Batches whose indices are copied to the device together, at least."""


class MicroBatch(NamedTuple):
    """What one rank sends through the model at once.

    Args:
        inputs: Tensor of shape (m, ...), ``Rows`` that become one, or a container of such.
        targets: The same.
        samples: True number of samples in it, m; 0 for a dummy, whose loss counts for nothing.
        is_last: Whether it ends this rank's part of the step.
    """

    inputs: Any
    targets: Any
    samples: int
    is_last: bool

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
    """

    step: int
    samples: int
    micro_batches: tuple[MicroBatch, ...]


class TrainLoader:
    """The training set in the order of the run, one step at a time.

    Args:
        dataset: Map-style data set of (input, target).
        sampler: Which samples this rank reads.
        epochs: Passes over the data.
        workers: Loader processes; 0 reads in this process.
        device: Where the batches go.
        collate: Function from a list of samples to a batch; None: torch's default_collate.
        arrays: The arrays of the data set, on the host or the device, if batches are rows of them.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: TrainSampler,
        *,
        epochs: int,
        workers: int,
        device: torch.device,
        collate: Collate | None = None,
        arrays: ArrayPair | None = None,
    ) -> None:
        self._sampler = sampler
        self._epochs = epochs
        fetcher = Fetcher(dataset, "data.train", sampler.seed, collate)
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
            self._sampler.set_epoch(epoch, first_step, skip)
            steps = self._read_epoch(step)
            yield from self._prefetcher.run(steps, _place_step) if self._prefetcher else steps
            step += self._sampler.steps_per_epoch - first_step
            first_step = skip = 0

    def read_ahead(self) -> None:
        """Read the next batch now, after a step was launched, if the device can compute meanwhile.

        Nothing is read beyond the end of an epoch. An error waits until that batch is asked for.
        """
        if self._prefetcher is not None:
            self._prefetcher.read_ahead()

    def _read_epoch(self, step: int) -> Iterator[StepBatches]:
        micro_batches: list[MicroBatch] = []
        for inputs, targets in _read(self._batches):
            drawn = self._requests.pending.popleft()
            micro_batches.append(MicroBatch(inputs, targets, drawn.size, drawn.is_last))
            if drawn.is_last:
                yield StepBatches(step, drawn.step_samples, tuple(micro_batches))
                micro_batches.clear()
                step += 1


def _place_step(batches: StepBatches, place: Place) -> StepBatches:
    """Copy the micro-batches of a step to the device."""
    placed = [
        batch._replace(inputs=place(batch.inputs), targets=place(batch.targets))
        for batch in batches.micro_batches
    ]
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
        arrays: The arrays of the data set, on the host or the device, if batches are rows of them.
    """

    def __init__(
        self,
        dataset: Any,
        chunks: EvalSampler,
        *,
        seed: int,
        workers: int,
        device: torch.device,
        collate: Collate | None = None,
        arrays: ArrayPair | None = None,
    ) -> None:
        self.chunks = chunks
        fetcher = Fetcher(dataset, "data.eval", seed, collate)
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

    def __iter__(self) -> Iterator[tuple[Rows, Rows]]:
        if _is_on_device(self._arrays):
            yield from prefetch_rows(self._arrays, self._requests.in_blocks(), self._transfer)
            return
        for request in self._requests:
            yield self._arrays.rows(torch.from_numpy(request.indices))


def _is_on_device(arrays: ArrayPair | None) -> bool:
    return arrays is not None and arrays.inputs.device.type != "cpu"


def _read(batches: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield (inputs, targets); raise where a batch could not be read."""
    try:
        for batch in batches:
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
        collate_fn=_Departure(workers, fetcher.where),
        multiprocessing_context=_start_method(),
        pin_memory=transfer is not None and transfer.device.type != "cpu",
        persistent_workers=True,
        worker_init_fn=partial(_leave_signals_to_the_rank, _flag_of_leaving()),
        # Its own: making an iterator draws a number, and the global generator is the model's.
        generator=torch.Generator().manual_seed(seed_for("loader", fetcher.seed)),
    )


def _start_method() -> str:
    """Start method of loader processes: as on Linux before Python 3.14, unless one is set.

    A forked process has the data set as it is. That of a fork server, Python 3.14's default, or one
    that is spawned has what a pickle of it holds, if there can be one, and imports torch again.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    own = multiprocessing.get_all_start_methods()[0]  # a process that was started may have set it
    if chosen is not None and chosen != own:
        return chosen
    return "fork" if sys.platform == "linux" else "spawn"


class _Departure:
    """Passes batches on unchanged, once the first shows that batches can leave a loader process.

    One that cannot be serialized would be lost on the way, and the rank would wait without an end.

    Args:
        workers: Number of loader processes.
        where: Key of the data set in the configuration, for errors.
    """

    def __init__(self, workers: int, where: str) -> None:
        self._workers = workers
        self._where = where
        self._checked = False

    def __call__(self, batch: Any) -> Any:
        if not self._checked:
            self._checked = True
            try:
                ForkingPickler.dumps(batch)
            except Exception as error:  # each type has its own
                return Unreadable(
                    f"data.workers is {self._workers} while a batch of {self._where} cannot leave "
                    f"its loader process, {type(error).__name__}: {' '.join(str(error).split())}; "
                    "return tensors without gradients and plain containers, or set data.workers=0."
                )
        return batch


def _leave_signals_to_the_rank(leaving: Any, _: int) -> None:
    """Have a loader process ignore a signal to the whole job, so that the rank can save.

    Args:
        leaving: Shared flag; once it is set, SIGTERM ends the process, or nothing could.
    """

    def note(number: int, _: FrameType | None) -> None:
        if leaving.value and number == signal.SIGTERM:
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)


def _flag_of_leaving() -> Any:
    """Make a flag, shared with loader processes, that is set when this process begins to exit."""
    leaving = RawValue("b", 0)

    def leave() -> None:
        leaving.value = 1

    atexit.register(leave)  # runs before multiprocessing's own hook, which was registered earlier
    return leaving
