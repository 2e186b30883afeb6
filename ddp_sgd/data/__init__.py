"""Data sets, samplers and loaders. What a configuration names is here; none of it needs torch."""

from ddp_sgd.data.datasets import Arrays, Columns, Digits, InMemory

__all__ = ["Arrays", "Columns", "Digits", "InMemory"]
