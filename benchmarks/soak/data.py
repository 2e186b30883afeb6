"""The digits, some of which are read as NaN: the same ones in every run of one seed."""

from typing import Any

import torch

from ddp_sgd.data import Digits


class SpoiltDigits(Digits):
    """Digits read one by one, each spoilt with a small chance.

    The chance is drawn from the numbers that are seeded by (seed, epoch, index), so that what is
    spoilt does not depend on ranks, restarts or time.

    Args:
        chance: Share of reads that give NaN, in [0, 1].
    """

    def __init__(self, chance: float = 0.0) -> None:
        super().__init__()
        self._chance = chance

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        pixels, digit = super().__getitem__(index)
        pixels = torch.as_tensor(pixels)
        return torch.where(torch.rand(()) < self._chance, torch.nan, pixels), digit
