"""Seeds of what a model draws, such as dropout: a pure function of (seed, step, rank)."""

import random

import numpy as np
import torch

from ddp_sgd.engine.side_effects import SideEffects
from ddp_sgd.seeds import seed_for


class Randomness:
    """The random number generators that a model and its loss draw from.

    torch's are seeded always. Seeding those of ``random`` and ``numpy.random`` takes 15 us, as long
    as a small layer, so they are seeded only if a pass was seen to draw from them.

    Args:
        device: Where the model computes.

    Attributes:
        generators: torch's generators, of the host and of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.generators = model_generators(device)
        self._draws_from_random = self._draws_from_numpy = False

    def follow(self, effects: SideEffects) -> None:
        """Seed from now on what passes were seen to draw from.

        Args:
            effects: What the passes have changed.
        """
        self._draws_from_random |= effects.draws_from_random
        self._draws_from_numpy |= effects.draws_from_numpy

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

    def seed_step(self, seed: int, step: int, rank: int) -> None:
        """Seed what one rank draws in one step.

        Args:
            seed: Seed of the run.
            step: Number of the step in the run, from 0.
            rank: Number of this process.
        """
        self.seed(seed_for("model", seed, step, rank))

    def seed_chunk(self, seed: int, chunk: int) -> None:
        """Seed what is drawn for one chunk of an evaluation, whichever rank scores it.

        Args:
            seed: Seed of the run.
            chunk: Number of the chunk, from 0.
        """
        self.seed(seed_for("evaluation", seed, chunk))


def model_generators(device: torch.device) -> tuple[torch.Generator, ...]:
    """Return torch's generators that a model on a device draws from."""
    host = torch.default_generator
    if device.type in ("cuda", "xpu"):
        return host, torch.get_device_module(device).default_generators[device.index]
    return (host,)
