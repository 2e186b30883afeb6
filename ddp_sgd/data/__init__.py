"""Data sets, samplers and loaders. What a configuration names is here; none of it needs torch."""

from ddp_sgd.data.arrays import Arrays
from ddp_sgd.data.columns import Columns
from ddp_sgd.data.digits import Digits
from ddp_sgd.data.in_memory import InMemory

__all__ = ["Arrays", "Columns", "Digits", "InMemory"]
