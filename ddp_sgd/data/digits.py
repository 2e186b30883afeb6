"""Handwritten digits that come with the package: 1,797 real images of 8 x 8 pixels."""

from importlib.resources import files
from typing import Literal

import numpy as np

from ddp_sgd.data.in_memory import InMemory
from ddp_sgd.errors import DataError


class Digits(InMemory):
    """The digits 0 to 9: 1,437 images to train on, 360 to score, in a fixed stratified split.

    Args:
        split: ``train`` or ``eval``.
        shape: ``flat`` gives inputs of shape (64,), ``image`` of (1, 8, 8); float32 in [0, 1].

    Raises:
        DataError: Another split or shape is asked for.

    Source:
        E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning
        Repository, 1998, doi:10.24432/C50P49, licence CC BY 4.0; its test part, as scikit-learn
        ships it. See ``digits.md`` beside the file for how it was made.
    """

    def __init__(
        self, split: Literal["train", "eval"] = "train", shape: Literal["flat", "image"] = "flat"
    ) -> None:
        if split not in ("train", "eval"):
            raise DataError(f"split is {split!r}; choose train or eval.")
        if shape not in ("flat", "image"):
            raise DataError(f"shape is {shape!r}; choose flat or image.")
        with files("ddp_sgd.data").joinpath("digits.npz").open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            chosen = archive["is_eval"] == (split == "eval")
            pixels = archive["pixels"][chosen].astype(np.float32) / 16
            targets = archive["labels"][chosen].astype(np.int64)
        super().__init__(pixels.reshape((-1, 64) if shape == "flat" else (-1, 1, 8, 8)), targets)
