"""Order of the samples of an epoch: shuffled, sequential, or computed by a function of the user's.

Shuffling: a random permutation evaluated in O(1) memory, by a Feistel network.
"""

import hashlib
from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddp_sgd.errors import ConfigError, UserError
from ddp_sgd.plan import OrderFacts
from ddp_sgd.seeds import seed_for

ORDER = "feistel-1"
"""Name of the order that a seed gives by shuffling. A checkpoint carries the name of its order: in
the middle of an epoch a run goes on in the same order only.
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


OrderFunction = Callable[[int, int, int, int], Any]
"""Gives the indices of an epoch for (n, seed, epoch, global batch)."""

Indices = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Gives the samples at some positions of an epoch."""


class Order(Protocol):
    """Which sample stands at each position of an epoch.

    Attributes:
        length: Positions in an epoch, m.
        facts: What the plan says about it.
    """

    length: int
    facts: OrderFacts

    def of_epoch(self, epoch: int) -> Indices:
        """Return the order of an epoch.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            ConfigError: A function of the user's fails for this epoch, or gives no order.
        """


class Shuffled:
    """A pseudo-random permutation of all samples for each epoch, evaluated in O(1) memory.

    Args:
        samples: Length of the data set, n, at least 1.
        seed: Seed of the run.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self.length = samples
        self.facts = OrderFacts.of_permutation(samples)
        self._seed = seed

    def of_epoch(self, epoch: int) -> Indices:
        """Return the permutation of an epoch."""
        return Permutation(self.length, seed_for("order", self._seed, epoch))


class Sequential:
    """All samples as the data set numbers them, in every epoch.

    Args:
        samples: Length of the data set, n, at least 1.
    """

    def __init__(self, samples: int) -> None:
        self.length = samples
        self.facts = OrderFacts.of_permutation(samples)

    def of_epoch(self, _: int) -> Indices:
        """Return the identity."""
        return lambda positions: positions


class Computed:
    """Indices that a function of the user's gives, once for each epoch, equally many in all.

    The function is called twice for the first epoch: what it gives must follow from its arguments.

    Args:
        function: Gives whole numbers in [0, n), of shape (m,), for (n, seed, epoch, global batch).
        samples: Length of the data set, n, at least 1.
        seed: Seed of the run.
        global_batch: Samples of all ranks in a full step, G.
        epoch: The epoch that the run starts in.

    Raises:
        ConfigError: The function fails, or gives something else, or other numbers the second time.
    """

    def __init__(
        self, function: OrderFunction, *, samples: int, seed: int, global_batch: int, epoch: int
    ) -> None:
        self._function = function
        self._arguments = samples, seed, global_batch
        self._first = epoch
        self._known = epoch, self._compute(epoch)
        self.length = len(self._known[1])
        if not np.array_equal(self._known[1], self._compute(epoch)):
            raise self._fault(
                epoch,
                "gives other indices at a second call",
                "let them follow from the arguments, such as by numpy.random.default_rng((seed, "
                "epoch))",
            )
        times = np.bincount(self._known[1], minlength=samples)
        self.facts = OrderFacts(
            length=self.length,
            distinct=int(np.count_nonzero(times)),
            repeated=int(np.count_nonzero(times > 1)),
            digest=hashlib.sha256(self._known[1].tobytes()).hexdigest()[:12],
        )

    def of_epoch(self, epoch: int) -> Indices:
        """Return the order of an epoch; the last one is kept."""
        if epoch != self._known[0]:
            indices = self._compute(epoch)
            if len(indices) != self.length:
                raise self._fault(
                    epoch,
                    f"gives {len(indices):,} indices, and {self.length:,} in epoch {self._first}",
                    "give equally many in every epoch: leave some out, or repeat some",
                )
            self._known = epoch, indices
        return self._known[1].take

    def _compute(self, epoch: int) -> NDArray[np.int64]:
        samples, seed, global_batch = self._arguments
        try:
            given = self._function(samples, seed, epoch, global_batch)
            indices = np.asarray(given.cpu() if hasattr(given, "cpu") else given)
        except UserError:
            raise
        except Exception as error:  # any error of a user's function
            raise self._fault(
                epoch,
                f"fails, {type(error).__name__}: {error}",
                "let it return indices for (n, seed, epoch, global_batch)",
            ) from error
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise self._fault(
                epoch,
                f"gives {_described(given, indices)}",
                "return whole numbers of shape (m,), one index for each position",
            )
        if not indices.size:
            raise self._fault(epoch, "gives no index", "return at least one")
        low, high = indices.min(), indices.max()
        if low < 0 or high >= samples:
            raise self._fault(
                epoch,
                f"gives the index {low if low < 0 else high}",
                f"return indices from 0 to {samples - 1}, of the {samples:,} samples of data.train",
            )
        return np.array(indices, np.int64)  # a copy: the function may fill its memory again

    def _fault(self, epoch: int, what: str, remedy: str) -> ConfigError:
        name = getattr(self._function, "__qualname__", type(self._function).__name__)
        return ConfigError(f"data.order is {name}, which in epoch {epoch} {what}; {remedy}.")


def _described(given: Any, indices: NDArray[Any]) -> str:
    if indices.ndim == 0:
        return f"a {type(given).__name__}"
    return f"numbers of type {indices.dtype} and shape {indices.shape}"


def build_order(
    chosen: str | OrderFunction, global_batch: int, *, samples: int, seed: int, epoch: int = 0
) -> Order:
    """Make the order that ``data.order`` names.

    Args:
        chosen: ``shuffled``, ``sequential``, or a function of the user's.
        global_batch: Samples of all ranks in a full step, G.
        samples: Length of the data set, n, at least 1.
        seed: Seed of the run.
        epoch: The epoch that the run starts in.

    Raises:
        ConfigError: The function fails for that epoch, or gives no order.
    """
    if not isinstance(chosen, str):
        return Computed(chosen, samples=samples, seed=seed, global_batch=global_batch, epoch=epoch)
    return Sequential(samples) if chosen == "sequential" else Shuffled(samples, seed)


def name_order(chosen: str | Mapping[str, Any]) -> str:
    """Name the order of a configuration, for checkpoints.

    Args:
        chosen: ``data.order`` as plain data.
    """
    if isinstance(chosen, str):
        return ORDER if chosen == "shuffled" else chosen
    return str(chosen["class_path"])
