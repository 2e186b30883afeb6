"""Data loaders: batches from the data set, in workers or not, to the device."""

import atexit
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader

from ddp_sgd.data.fetcher import (
    AHEAD_BYTES,
    EVAL_EPOCH,
    Collate,
    Fetcher,
    Request,
    Unreadable,
)
from ddp_sgd.data.sampler import EvalSampler, TrainSampler
from ddp_sgd.errors import DataError, lost_worker
from ddp_sgd.seeds import seed_for
from ddp_sgd.tree import map_leaves


class MicroBatch(NamedTuple):
    """What one rank sends through the model at once.

    Args:
        inputs: Tensor of shape (m, ...), or a container of such.
        targets: Tensor of shape (m, ...), or a container of such.
        samples: True number of samples in it, m; 0 for a dummy, whose loss counts for nothing.
        is_last: Whether it ends this rank's part of the step.
    """

    inputs: Any
    targets: Any
    samples: int
    is_last: bool

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same batch on a device; the copy from pinned memory does not wait."""
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
    ) -> None:
        self._sampler = sampler
        self._epochs = epochs
        fetcher = Fetcher(dataset, "data.train", sampler.seed, collate)
        self._requests = _Requests(sampler)
        self._batches = _build_batches(fetcher, self._requests, workers, device, sampler.seed)

    def from_step(self, step: int, skip: int = 0) -> Iterator[StepBatches]:
        """Yield what this rank computes in each step, on the host, to the end of the run.

        Args:
            step: Number of the first step, from 0.
            skip: Samples at the head of that step that were trained already.

        Raises:
            DataError: A sample cannot be read.
        """
        first_epoch, first_step = divmod(step, self._sampler.steps_per_epoch)
        micro_batches: list[MicroBatch] = []
        for epoch in range(first_epoch, self._epochs):
            self._sampler.set_epoch(epoch, first_step, skip)
            for inputs, targets in _read(self._batches):
                drawn = self._requests.pending.popleft()
                micro_batches.append(MicroBatch(inputs, targets, drawn.size, drawn.is_last))
                if drawn.is_last:
                    yield StepBatches(step, drawn.step_samples, tuple(micro_batches))
                    micro_batches.clear()
                    step += 1
            first_step = skip = 0


class EvalLoader:
    """A held-out set in chunks that do not depend on the number of ranks.

    Args:
        dataset: Map-style data set of (input, target).
        chunks: Which chunks this rank reads.
        seed: Seed of the run.
        workers: Loader processes; 0 reads in this process.
        device: Where the batches go.
        collate: Function from a list of samples to a batch; None: torch's default_collate.
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
    ) -> None:
        self.chunks = chunks
        fetcher = Fetcher(dataset, "data.eval", seed, collate)
        self._requests = _Requests(chunks)
        self._batches = _build_batches(fetcher, self._requests, workers, device, seed)

    def __iter__(self) -> Iterator[tuple[int, int, Any, Any]]:
        """Yield (number of the chunk, its samples, inputs, targets), on the host."""
        for inputs, targets in _read(self._batches):
            drawn = self._requests.pending.popleft()
            yield drawn.number, drawn.size, inputs, targets


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


class _InProcess:
    """Batches that are read where they are used, without the way through DataLoader.

    Small ones are read several at a time: a call for 8 kB takes as long as the copy of 100 kB.
    """

    def __init__(self, fetcher: Fetcher, requests: Iterable[Request], *, pinned: bool) -> None:
        self._fetcher = fetcher
        self._requests = requests
        self._pinned = pinned

    def __iter__(self) -> Iterator[Any]:
        requests, at_once = iter(self._requests), 1
        while burst := list(islice(requests, at_once)):
            batches = self._fetcher.read_ahead(burst)
            if at_once == 1 and self._fetcher.reads_plainly:
                at_once = _batches_at_once(batches[0])
            for batch in batches:
                yield _for_movable(batch, _pin) if self._pinned else batch


def _batches_at_once(batch: Any) -> int:
    if isinstance(batch, Unreadable):
        return 1
    num_bytes: int = sum(part.nbytes for part in batch)
    return max(1, AHEAD_BYTES // max(1, num_bytes))


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
    fetcher: Fetcher, requests: _Requests, workers: int, device: torch.device, seed: int
) -> Iterable[Any]:
    pinned = device.type == "cuda"
    if workers == 0:
        return _InProcess(fetcher, requests, pinned=pinned)
    return DataLoader(
        fetcher,  # type: ignore[arg-type]  # torch types data sets by class, not by methods
        batch_sampler=requests,  # type: ignore[arg-type]  # torch types it as lists of indices
        num_workers=workers,
        collate_fn=_Departure(workers, fetcher.where),
        multiprocessing_context=_start_method(),
        pin_memory=pinned,
        persistent_workers=True,
        worker_init_fn=partial(_leave_signals_to_the_rank, _flag_of_leaving()),
        # Its own: making an iterator draws a number, and the global generator is the model's.
        generator=torch.Generator().manual_seed(seed_for("loader", seed)),
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


def move(value: Any, device: torch.device) -> Any:
    """Put tensors, also those in lists, tuples and mappings, on a device.

    So are objects with a method ``to``, such as packed sequences and the batches of tokenizers.
    """

    def change(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            return each.to(device, non_blocking=True)
        return each.to(device)

    return _for_movable(value, change)


def _pin(each: Any) -> Any:
    """Lock the memory of dense tensors on the host, and of objects that can do so by themselves."""
    if isinstance(each, torch.Tensor):
        is_pinnable = each.device.type == "cpu" and each.layout is torch.strided
    else:  # such as packed sequences, whose tensors may be on a device
        is_pinnable = hasattr(each, "pin_memory") and not getattr(each, "is_cuda", False)
    return each.pin_memory() if is_pinnable else each


def _for_movable(value: Any, change: Callable[[Any], Any]) -> Any:
    def change_movable(each: Any) -> Any:
        return change(each) if hasattr(each, "to") else each

    # A packed sequence is a tuple with lengths for the host, and has the method itself.
    return map_leaves(change_movable, value, is_leaf=lambda each: hasattr(each, "to"))
