"""Samplers: which sample each rank reads when, a pure function of seed, epoch and position.

Shuffling: a random permutation evaluated in O(1) memory, by a Feistel network.
"""

from collections.abc import Iterator
from functools import lru_cache
from math import isqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from ddp_sgd.plan import micro_batch_sizes
from ddp_sgd.seeds import seed_for

ORDER = "feistel-1"
"""Name of the order that a seed gives. A checkpoint carries it: in the middle of an epoch a run
goes on in the same order only.
"""

_ROUNDS = 8  # even, so that the halves end where they began
_SMALLEST_SIDE = 8  # below that, 8 rounds of mixing are visible in 100,000 orders of 5 samples

_HALF = np.array(32, np.uint64)
_MIX_LEFT = np.array(0x9E3779B97F4A7C15, np.uint64)
_MIX_RIGHT = np.array(0xD6E8FEB86659FD93, np.uint64)


class Permutation:
    """A pseudo-random bijection of 0..n-1, evaluated at any positions in O(1) memory.

    A number x < a b is a pair (x // b, x mod b). A round takes (left, right) to
    (right + F(left) mod m, left), with F a keyed hash and m the size of right; it can be undone, so
    that rounds are a bijection of 0..ab-1 for any F. A value of n or more goes through the
    rounds again until it is smaller (cycle walking): what is left is a bijection of 0..n-1. With
    a and b near the root of n that is rare, but for n below 64.

    Args:
        samples: n, in [1, 2^62].
        seed: Equal seeds give equal permutations on every machine.

    Example:
        >>> sorted(Permutation(5, seed=1)(np.arange(5)).tolist())
        [0, 1, 2, 3, 4]

    Source:
        Feistel networks: Luby, Rackoff 1988, doi:10.1137/0217022; sides of any size and cycle
        walking: Black, Rogaway 2002, doi:10.1007/3-540-45760-7_9.
    """

    def __init__(self, samples: int, seed: int) -> None:
        left = max(isqrt(samples - 1) + 1, _SMALLEST_SIDE)
        right = max(-(-samples // left), _SMALLEST_SIDE)
        right += right % 2  # of two odd sides, rounds would give even permutations only
        # Arrays without dimensions: numpy takes twice as long to add a number to a short array.
        self._samples = np.array(samples, np.uint64)
        self._left = np.array(left, np.uint64)
        self._right = np.array(right, np.uint64)
        self._keys = [
            np.array(seed_for("round", seed, number), np.uint64) for number in range(_ROUNDS)
        ]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return what stands at each position.

        Args:
            positions: Numbers in [0, n), of shape (m,).

        Returns:
            Numbers in [0, n), of shape (m,); different for different positions.
        """
        values = self._mix(positions.view(np.uint64))
        while (outside := np.flatnonzero(values >= self._samples)).size:
            values[outside] = self._mix(values[outside])
        return values.view(np.int64)

    def _mix(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left = values // self._right
        right = values - left * self._right
        size, other_size = self._right, self._left
        for key in self._keys:
            left, right = _hash_below(size, left, key) + right, left
            np.minimum(left, left - size, out=left)  # modulo: below zero wraps to the far end
            size, other_size = other_size, size
        return left * self._right + right


def _hash_below(
    size: NDArray[np.uint64], values: NDArray[np.uint64], key: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """Hash values to numbers in [0, size), with size at most 2^32."""
    hashed = values + key
    hashed *= _MIX_LEFT
    hashed ^= hashed >> _HALF
    hashed *= _MIX_RIGHT
    hashed >>= _HALF
    hashed *= size  # the upper half of a product of 32 bits each, instead of a slow remainder
    hashed >>= _HALF
    return hashed


_AT_ONCE = 4096
"""Positions of the permutation that are worked out together, unless one step has more."""

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
    """One permutation an epoch, dealt out to the ranks step by step, without padding.

    Step k of an epoch owns the positions [k G, min((k + 1) G, n)) of the permutation. Of these,
    rank r reads every W-th from number r on, in micro-batches of at most b. So the union of what
    the ranks read in a step does not depend on W, and every sample is read once per epoch.

    Iterating yields this rank's micro-batches from ``first_step`` to the end of the epoch, or up to
    ``stop_step``. A rank
    that has no sample in a step yields one index of that step all the same, a dummy to be weighted
    with zero, so that every rank takes part in every step.

    The permutation is worked out some thousand positions at a time, so that time to the first batch
    and memory do not depend on n, or on the place where an epoch is taken up.

    Args:
        samples: Length of the data set, n, at least 1.
        global_batch: Samples of all ranks in a full step, G.
        batch_size: Most samples in a micro-batch, b.
        rank: Number of this process, r.
        world_size: Number of processes, W.
        seed: Seed of the run.
        tail: ``exact`` yields the last, smaller step of an epoch; ``drop`` leaves it out.

    Source:
        The strided share is that of torch.utils.data.DistributedSampler, which pads instead.
    """

    def __init__(
        self,
        samples: int,
        *,
        global_batch: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int = 0,
        tail: str = "exact",
    ) -> None:
        super().__init__(
            range(samples),  # type: ignore[arg-type]  # only its length is used
            num_replicas=world_size,
            rank=rank,
            seed=seed,
            drop_last=tail == "drop",
        )
        self.samples = samples
        self.global_batch = global_batch
        self.batch_size = batch_size
        self.first_step = 0
        self.skip = 0
        full_steps, rest = divmod(samples, global_batch)
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
        """Return the whole order of this epoch: int64 of shape (n,), equal on all ranks."""
        return self._permutation()(np.arange(self.samples))

    def __iter__(self) -> Iterator[MicroBatchIndices]:
        permutation = self._permutation()
        share = -(-self.global_batch // self.num_replicas)
        steps_at_once = max(1, _AT_ONCE // share)
        for first in range(self.first_step, self.stop_step, steps_at_once):
            steps = range(first, min(first + steps_at_once, self.stop_step))
            indices = permutation(np.concatenate([self._positions(step) for step in steps]))
            start = 0
            for step in steps:
                samples, sizes = self.share(step)
                for left, size in enumerate(sizes, start=1 - len(sizes)):  # 0 at the last one
                    stop = start + (size or 1)
                    yield MicroBatchIndices(indices[start:stop], size, left == 0, samples)
                    start = stop

    def __len__(self) -> int:
        return sum(len(self.share(step)[1]) for step in range(self.first_step, self.stop_step))

    def _permutation(self) -> Permutation:
        return Permutation(self.samples, seed_for("order", self.seed, self.epoch))

    def _positions(self, step_in_epoch: int) -> NDArray[np.int64]:
        """Positions of the permutation that this rank reads in a step, or that of a dummy."""
        start, stop = self._bounds(step_in_epoch)
        share = np.arange(start + self.rank, stop, self.num_replicas)
        return share if share.size else np.array([start])

    def _bounds(self, step_in_epoch: int) -> tuple[int, int]:
        """Positions of the permutation that a step owns: from the first up to the second."""
        start = step_in_epoch * self.global_batch
        stop = min(start + self.global_batch, self.samples)
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
