"""Data sets, samplers and loaders. What a configuration names is here; none of it needs torch."""

from ddp_sgd.data.arrays import Arrays
from ddp_sgd.data.datasets import Columns, Digits, InMemory
from ddp_sgd.data.idx import Idx

__all__ = ["Arrays", "Columns", "Digits", "Idx", "InMemory"]
