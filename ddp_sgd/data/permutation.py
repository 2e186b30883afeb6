"""Shuffling: a random permutation evaluated in O(1) memory, by a Feistel network."""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

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
    that rounds are a bijection of 0..ab-1 whatever F is. A value of n or more goes through the
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
