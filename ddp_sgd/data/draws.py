"""Random numbers of transforms: counter-based, the same on any device and for any split.

A number is a hash of seed, epoch, index and transform, by integer operations on tensors. There is
no state, so that nothing depends on what was drawn before, and a resume needs nothing.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

Indices = torch.Tensor | NDArray[np.int64]
"""Samples of a batch, int64 of shape (m,): an array on the host, or a tensor on any device."""

Number = int | torch.Tensor
"""Number of an epoch; a tensor on the device without dimensions, where a graph is captured."""

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # constants are below 2^63: tensors have no unsigned products
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
_SHIFTS = (30, 27, 31)
_UNIFORM_BITS = 24
_LOW_32 = 0xFFFF_FFFF


def mix(numbers: torch.Tensor) -> torch.Tensor:
    """Hash 64-bit integers to 64-bit integers, one to one; products wrap around.

    Three times x ^= x >> s, with a logical shift, and a product by an odd constant in between.

    Args:
        numbers: int64 tensor of any shape.

    Source:
        Finalizer of SplitMix64: Steele, Lea, Flood 2014, doi:10.1145/2660193.2660195.
    """
    for shift, factor in zip(_SHIFTS, (*_MULTIPLIERS, 1), strict=True):
        # The shift of a signed number repeats its sign, which the mask removes.
        numbers = numbers ^ ((numbers >> shift) & ((1 << 64 - shift) - 1))
        if factor != 1:
            numbers *= factor
    return numbers


def sample_keys(base: int, epoch: Number, indices: torch.Tensor) -> torch.Tensor:
    """Hash (seed, epoch, index) for each sample.

    Args:
        base: Follows from the seed of the run.
        epoch: Number of the epoch; a tensor without dimensions, on the device, gives the same.
        indices: Samples, int64 of shape (m,).

    Returns:
        int64 of shape (m,), where the indices are.
    """
    if isinstance(epoch, torch.Tensor):
        return mix(indices * _GAMMA + _epoch_key(base, epoch))
    return mix(indices * _GAMMA + _epoch_key_on_host(base, epoch))


def _epoch_key(base: int, epoch: torch.Tensor) -> torch.Tensor:
    return mix(epoch * _GAMMA + base)


@lru_cache
def _epoch_key_on_host(base: int, epoch: int) -> torch.Tensor:
    """Hash (seed, epoch), as a tensor without dimensions, which goes to a device as a number."""
    return _epoch_key(base, torch.tensor(epoch, device="cpu"))


class Draws:
    """Random numbers for the samples of a batch, one row for each.

    Number j = 1, 2, ... of a transform for a sample is mix((mix(epoch key + index * gamma) ^
    stream) + j * gamma), where the epoch key follows from (seed, epoch), and the stream from (seed,
    class name, occurrence of that class among the transforms). Every call continues where the one
    before it ended. Nothing depends on the other samples of the batch, and nothing waits for the
    device.

    Args:
        keys: int64 of shape (m,), a hash of (seed, epoch, index) for each sample.
        stream: What keeps one transform apart from the others.
    """

    def __init__(self, keys: torch.Tensor, stream: int = 0) -> None:
        self._start = (keys ^ stream)[:, None]
        self._drawn = 0

    @property
    def samples(self) -> int:
        """Number of samples in the batch, m."""
        return len(self._start)

    def bits(self, count: int = 1) -> torch.Tensor:
        """Draw 64 random bits for each sample, as int64 of shape (m, count)."""
        first = self._drawn + 1
        self._drawn += count
        numbers = torch.arange(first, first + count, device=self._start.device)
        return mix(self._start + numbers * _GAMMA)

    def uniform(self, count: int = 1) -> torch.Tensor:
        """Draw from [0, 1), as float32 of shape (m, count): multiples of 2^-24, each as likely."""
        upper = (self.bits(count) >> 64 - _UNIFORM_BITS) & ((1 << _UNIFORM_BITS) - 1)
        return upper.to(torch.float32) * 2.0**-_UNIFORM_BITS

    def integers(self, low: int, high: int, count: int = 1) -> torch.Tensor:
        """Draw whole numbers from low to high - 1, as int64 of shape (m, count).

        A number is floor(u (high - low)) above low, for u of 32 bits: no probability is off by more
        than 2^-32, which is nothing for the sizes of images.

        Args:
            low: Smallest number.
            high: One more than the largest; at most low + 2^31.
            count: Numbers for each sample.

        Raises:
            ValueError: The range is empty or too long.
        """
        if not 0 < high - low <= 2**31:
            raise ValueError(f"the range from {low} up to {high} has no number, or more than 2^31")
        upper = (self.bits(count) >> 32) & _LOW_32
        return ((upper * (high - low)) >> 32) + low
