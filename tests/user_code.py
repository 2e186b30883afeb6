"""What a user may name in a configuration, good and bad."""

import os

import numpy as np


class FailsOnRank:
    """Data that one rank cannot read, from the second sample on that it is asked for in training."""

    def __init__(self, rank):
        self._rank = rank

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if os.environ.get("RANK") == str(self._rank) and index > 1:
            raise OSError("the disk is gone")
        return np.zeros(4, np.float32), 0
