"""Sample batch for the sanity check, and the requirements on a data set."""

from collections.abc import Sized
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import IterableDataset

from ddp_sgd.data.fetcher import EVAL_EPOCH, Collate, Fetcher, Request, Unreadable
from ddp_sgd.errors import ConfigError, DataError

_MOST_SAMPLES = 8
"""Samples of the batch: enough for pairs of one class, few enough for any memory."""


class Batch(NamedTuple):
    """A few samples, spread over a data set.

    Args:
        inputs: Inputs, on the host.
        targets: Targets, on the host.
        targets_of_one: Targets of each sample alone.
        indices: Which samples.
    """

    inputs: Any
    targets: Any
    targets_of_one: list[Any]
    indices: list[int]


def check_dataset(dataset: Any, where: str) -> None:
    """Refuse what is not a map-style data set with at least one sample.

    Raises:
        ConfigError: It has no length, or gives no sample for an index.
        DataError: It is empty.
    """
    by_index = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    if not by_index or isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"{where} is a {type(dataset).__name__}, which has no length or no samples by index; "
            "name a map-style data set (streaming data sets are not supported)."
        )
    if len(dataset) == 0:
        raise DataError(f"{where} is empty; name a data set with at least one sample.")


def read_batch(dataset: Any, where: str, *, batch_size: int, collate: Collate | None) -> Batch:
    """Read a few samples, spread over a data set, in the way of an evaluation.

    Args:
        dataset: Map-style data set with at least one sample.
        where: Its key, for errors.
        batch_size: Samples of a micro-batch.
        collate: Function from a list of samples to a batch; None: torch's default_collate.

    Raises:
        DataError: The samples cannot be read.
    """
    samples = min(len(dataset), max(2, min(_MOST_SAMPLES, batch_size)))
    indices = np.linspace(0, len(dataset) - 1, samples).astype(np.int64)
    fetcher = Fetcher(dataset, where, 0, collate)
    read = fetcher.read_with_singles(Request(EVAL_EPOCH, indices))
    if isinstance(read, Unreadable):
        raise DataError(read.message)
    (inputs, targets), singles = read
    return Batch(inputs, targets, [target for _, target in singles], indices.tolist())
