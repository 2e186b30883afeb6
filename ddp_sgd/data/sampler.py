"""Samplers: which sample each rank reads when, a pure function of seed, epoch and position."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from ddp_sgd.data.order import Order, Shuffled
from ddp_sgd.plan import micro_batch_sizes

_AT_ONCE = 4096
"""Positions of an epoch that are worked out together, unless one step has more."""

_sizes = lru_cache(micro_batch_sizes)  # an epoch has steps of two or three sizes


class MicroBatchIndices(NamedTuple):
    """A micro-batch as a ``TrainSampler`` yields it.

    Args:
        indices: Samples to read, int64 of shape (m,), m >= 1.
        size: How many of them count: m, or 0 for a dummy.
        is_last: Whether it ends this rank's part of the step.
        step_samples: Samples of the step, over all ranks.
    """

    indices: NDArray[np.int64]
    size: int
    is_last: bool
    step_samples: int


class ChunkIndices(NamedTuple):
    """A chunk as an ``EvalSampler`` yields it.

    Args:
        indices: Samples to read, int64 of shape (m,), m >= 1.
        size: How many of them count: m, or 0 for a dummy.
        number: Number of the chunk, from 0.
    """

    indices: NDArray[np.int64]
    size: int
    number: int


class TrainSampler(DistributedSampler[MicroBatchIndices]):
    """One order an epoch, dealt out to the ranks step by step, without padding.

    Step k of an epoch owns the positions [k G, min((k + 1) G, m)) of the order. Of these, rank r
    reads every W-th from number r on, in micro-batches of at most b. So the union of what the ranks
    read in a step does not depend on W, and every position is read once per epoch: every sample
    once, if the order is a permutation.

    Iterating yields this rank's micro-batches from ``first_step`` to the end of the epoch, or up to
    ``stop_step``. A rank
    that has no sample in a step yields one index of that step all the same, a dummy to be weighted
    with zero, so that every rank takes part in every step.

    A permutation is worked out some thousand positions at a time, so that time to the first batch
    and memory do not depend on n, or on the place where an epoch is taken up.

    Args:
        samples: Length of the data set, n, at least 1.
        global_batch: Samples of all ranks in a full step, G.
        batch_size: Most samples in a micro-batch, b.
        rank: Number of this process, r.
        world_size: Number of processes, W.
        seed: Seed of the run.
        tail: ``exact`` yields the last, smaller step of an epoch; ``drop`` leaves it out.
        order: Which sample stands where; None: a permutation for each epoch.

    Source:
        The strided share is that of torch.utils.data.DistributedSampler, which pads instead.
    """

    def __init__(  # noqa: PLR0913  # who reads how much of which order
        self,
        samples: int,
        *,
        global_batch: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int = 0,
        tail: str = "exact",
        order: Order | None = None,
    ) -> None:
        super().__init__(
            range(samples),  # type: ignore[arg-type]  # only its length is used
            num_replicas=world_size,
            rank=rank,
            seed=seed,
            drop_last=tail == "drop",
        )
        self.order = Shuffled(samples, seed) if order is None else order
        self.global_batch = global_batch
        self.batch_size = batch_size
        self.first_step = 0
        self.skip = 0
        full_steps, rest = divmod(self.order.length, global_batch)
        self.steps_per_epoch = full_steps + (1 if rest and not self.drop_last else 0)
        self.stop_step = self.steps_per_epoch

    def set_epoch(
        self, epoch: int, first_step: int = 0, skip: int = 0, stop_step: int | None = None
    ) -> None:
        """Choose the epoch, and the step in it, that the next iteration starts with.

        Args:
            epoch: Number of the epoch, from 0.
            first_step: Number of the step in it.
            skip: Samples at the head of that step that were trained already, in [0, G): a run that
                goes on with another global batch may begin in the middle of one.
            stop_step: Number of the step in it before which a run ends, if it is one of the epoch;
                None: it ends with the epoch, or later.
        """
        super().set_epoch(epoch)
        self.first_step = first_step
        self.skip = skip
        last = self.steps_per_epoch
        self.stop_step = last if stop_step is None else min(stop_step, last)

    def share(self, step_in_epoch: int) -> tuple[int, tuple[int, ...]]:
        """Count the samples of a step, over all ranks, and in each of this rank's micro-batches.

        A dummy has ``(0,)``.
        """
        start, stop = self._bounds(step_in_epoch)
        samples = stop - start
        return samples, _sizes(samples, self.rank, self.num_replicas, self.batch_size) or (0,)

    def permutation(self) -> NDArray[np.int64]:
        """Return the whole order of this epoch: int64 of shape (m,), equal on all ranks."""
        return self.order.of_epoch(self.epoch)(np.arange(self.order.length))

    def __iter__(self) -> Iterator[MicroBatchIndices]:
        order = self.order.of_epoch(self.epoch)
        share = -(-self.global_batch // self.num_replicas)
        steps_at_once = max(1, _AT_ONCE // share)
        for first in range(self.first_step, self.stop_step, steps_at_once):
            steps = range(first, min(first + steps_at_once, self.stop_step))
            indices = order(np.concatenate([self._positions(step) for step in steps]))
            start = 0
            for step in steps:
                samples, sizes = self.share(step)
                for left, size in enumerate(sizes, start=1 - len(sizes)):  # 0 at the last one
                    stop = start + (size or 1)
                    yield MicroBatchIndices(indices[start:stop], size, left == 0, samples)
                    start = stop

    def __len__(self) -> int:
        return sum(len(self.share(step)[1]) for step in range(self.first_step, self.stop_step))

    def _positions(self, step_in_epoch: int) -> NDArray[np.int64]:
        """Positions of the order that this rank reads in a step, or that of a dummy."""
        start, stop = self._bounds(step_in_epoch)
        share = np.arange(start + self.rank, stop, self.num_replicas)
        return share if share.size else np.array([start])

    def _bounds(self, step_in_epoch: int) -> tuple[int, int]:
        """Positions of the order that a step owns: from the first up to the second."""
        start = step_in_epoch * self.global_batch
        stop = min(start + self.global_batch, self.order.length)
        return start + (self.skip if step_in_epoch == self.first_step else 0), stop


class EvalSampler:
    """The data set in its own order, in equal chunks, of which rank r reads every W-th.

    The chunks do not depend on the number of ranks, so that a model sees the same batches, and
    gives the same bits, on any number of them. Nothing is padded.

    Args:
        samples: Length of the data set, n.
        batch_size: Samples in a chunk; the last may have fewer.
        rank: Number of this process, r.
        world_size: Number of processes, W.
        in_step: Whether all ranks read equally many chunks, since the loss communicates. A
            rank that has none left reads the first one again, as a dummy of size 0.
    """

    def __init__(
        self, samples: int, *, batch_size: int, rank: int, world_size: int, in_step: bool = False
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.in_step = in_step
        self.count = -(-samples // batch_size)
        rounds = -(-self.count // world_size)
        self.mine = range(rank, rounds * world_size if in_step else self.count, world_size)

    def indices(self, number: int) -> NDArray[np.int64]:
        """Return the samples of a chunk, int64 of shape (m,); a dummy has those of the first."""
        start = number * self.batch_size if number < self.count else 0
        return np.arange(start, min(start + self.batch_size, self.samples))

    def __iter__(self) -> Iterator[ChunkIndices]:
        for number in self.mine:
            indices = self.indices(number)
            yield ChunkIndices(indices, len(indices) if number < self.count else 0, number)

    def __len__(self) -> int:
        return len(self.mine)
