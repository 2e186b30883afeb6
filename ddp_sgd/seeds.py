"""Random seeds as a pure function of their use, so that no generator state is saved."""

import random
import struct
from collections.abc import Callable
from hashlib import blake2b
from typing import ClassVar, TypeVar

import numpy as np
import torch

T = TypeVar("T")


def seed_for(purpose: str, seed: int, *place: int) -> int:
    """Mix the seed of a run with a place in it.

    Equal arguments give equal seeds on every machine; any other argument gives an unrelated one.

    Args:
        purpose: What the numbers are for, such as ``order`` or ``sample``; keeps streams apart.
        seed: Seed of the run, in [0, 2^63).
        place: Coordinates such as epoch, step, rank or index, each in [-2^63, 2^63).

    Returns:
        A seed in [0, 2^63).

    Example:
        >>> seed_for("order", 0, 1) == seed_for("order", 1, 0)
        False
    """
    message = purpose.encode() + struct.pack(f"<{1 + len(place)}q", seed, *place)
    return int.from_bytes(blake2b(message, digest_size=8).digest(), "little") >> 1


class Randomness:
    """The random number generators that a model and its loss draw from.

    torch's are seeded always. Seeding those of ``random`` and ``numpy.random`` takes 15 us, as long
    as a small layer, so they are seeded only if a pass was seen to draw from them.

    Attributes:
        generators: torch's generators, of the host and of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.generators = model_generators(device)
        self._draws_from_random = self._draws_from_numpy = False

    def follow(self, *, draws_from_random: bool, draws_from_numpy: bool) -> None:
        """Seed from now on what passes were seen to draw from, besides torch's generators.

        Args:
            draws_from_random: The generator of ``random``.
            draws_from_numpy: The global generator of ``numpy.random``.
        """
        self._draws_from_random |= draws_from_random
        self._draws_from_numpy |= draws_from_numpy

    def seed(self, number: int) -> None:
        """Seed all generators.

        Args:
            number: Seed in [0, 2^63).
        """
        for generator in self.generators:
            generator.manual_seed(number)
        if self._draws_from_random:
            random.seed(number)
        if self._draws_from_numpy:
            np.random.seed(number & 0xFFFF_FFFF)  # the global one, which models draw from

    def seed_chunk(self, seed: int, chunk: int) -> None:
        """Seed what is drawn for one chunk of an evaluation, the same on any rank.

        Args:
            seed: Seed of the run.
            chunk: Number of the chunk, from 0.
        """
        self.seed(seed_for("evaluation", seed, chunk))


class ReadingRandomness:
    """The random number generators that readings of samples draw from.

    torch's is seeded for every reading. Seeding those of ``random`` and ``numpy.random`` takes as
    long as a small batch, so it is left out as long as nothing draws from them: twins, which begin
    with the same seed, then give the same numbers. A reading that was seen to draw is done again
    with its seed, and all are seeded from then on.

    Args:
        seeds_all: Whether all are seeded from the beginning.
    """

    _twins: ClassVar[tuple[random.Random, np.random.RandomState] | None] = None

    def __init__(self, *, seeds_all: bool = False) -> None:
        self._seeds_all = seeds_all

    def read(self, seed: int, read: Callable[[], T]) -> T:
        """Return what a reading gives that begins with a seed.

        Args:
            seed: Seed in [0, 2^63).
            read: Reads samples; called a second time if the first was seen to draw.
        """
        self._seeds_all = self._seeds_all or self._saw_draws(seed)
        if not self._seeds_all:
            torch.default_generator.manual_seed(seed)
            samples = read()
            self._seeds_all = self._saw_draws(seed)
            if not self._seeds_all:
                return samples
        self.seed(seed)
        return read()

    @staticmethod
    def seed(number: int) -> None:
        """Seed all generators.

        Args:
            number: Seed in [0, 2^63).
        """
        torch.default_generator.manual_seed(number)
        random.seed(number)
        np.random.seed(number & 0xFFFF_FFFF)  # augmentations draw from the global one

    @classmethod
    def _saw_draws(cls, seed: int) -> bool:
        """Whether anything in this process drew since the last call; the first one seeds."""
        if cls._twins is None:
            number = seed & 0xFFFF_FFFF
            random.seed(seed)
            np.random.seed(number)
            cls._twins = random.Random(seed), np.random.RandomState(number)
        twin, numpys = cls._twins
        return (
            random.getrandbits(64) != twin.getrandbits(64)
            or np.random.random_sample() != numpys.random_sample()
        )


def model_generators(device: torch.device) -> tuple[torch.Generator, ...]:
    """Return torch's generators that a model on a device draws from."""
    host = torch.default_generator
    if device.type in ("cuda", "xpu"):
        return host, torch.get_device_module(device).default_generators[device.index]
    return (host,)
