"""Sample batch for the sanity check, and the requirements on a data set.

Labels: whether a data set lists them, and whether the model has a score for each.

Model inputs: how what a data set gives becomes the arguments of the model's forward.
"""

import inspect
from collections.abc import Mapping, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from ddp_sgd.data.fetcher import EVAL_EPOCH, Collate, Fetcher, Request, Unreadable
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.losses import Spread

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


def listed_targets(dataset: Any, batch: Batch) -> torch.Tensor | None:
    """Return the targets of all samples, where a data set lists them as it gives them; else None.

    The list counts only if it equals the targets that were read: a transform may change those.

    Args:
        dataset: Data set with an attribute ``targets``, as torchvision's have, or torch's own.
        batch: Samples of it; only integer targets of shape (m,) are looked for.
    """
    listed = getattr(dataset, "targets", None)
    targets = batch.targets
    if isinstance(dataset, TensorDataset):
        listed = dataset.tensors[-1]
    is_changed = getattr(dataset, "target_transform", None) is not None
    if listed is None or is_changed or not isinstance(targets, torch.Tensor):
        return None
    try:
        labels = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError):  # lists of something else than numbers
        return None
    fits = labels.shape == (len(dataset),) and not labels.is_floating_point()
    if not fits or targets.is_floating_point() or targets.ndim != 1:
        return None
    return labels if torch.equal(labels[batch.indices].to(targets), targets) else None


def check_labels(labels: torch.Tensor, classes: int, where: str) -> None:
    """Refuse class labels that the model has no score for.

    Raises:
        DataError: A label is negative or too large.
    """
    if labels.numel() == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{where} has labels from {low} to {high} while the model gives {classes} scores; "
            f"number the labels from 0, or give the model {max(high + 1, 2)} classes."
        )


def count_classes(outputs: Any, targets: Any) -> int | None:
    """Count the classes of scores of shape (m, C, ...) for integer targets of shape (m, ...)."""
    if not (isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor)):
        return None
    fits = outputs.ndim == targets.ndim + 1 and outputs.ndim > 1
    is_of_pixels = fits and outputs.shape[2:] == targets.shape[1:] and outputs.shape[1] > 1
    return outputs.shape[1] if is_of_pixels and not targets.is_floating_point() else None


def choose_spread(model: nn.Module, inputs: Any, samples: int) -> Spread:
    """Choose how inputs reach a model, by the signature of its ``forward``.

    A mapping becomes keyword arguments, and a list or tuple positional ones, where ``forward``
    takes several arguments that these fit. A list of one entry per sample, as detection models
    take, is one argument.

    Args:
        model: The module.
        inputs: Inputs of a batch.
        samples: Number of samples in it.
    """
    if not isinstance(inputs, (Mapping, list, tuple)):
        return "whole"
    parameters = _parameters_of(model)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(inputs, Mapping):
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        fits = takes_any or set(inputs) <= {p.name for p in named}
        return "keywords" if fits and (len(named) > 1 or takes_any) else "whole"
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = [p for p in positional if p.default is p.empty]
    fits = len(required) <= len(inputs) and (takes_any or len(inputs) <= len(positional))
    several = takes_any or len(positional) > 1
    is_rows = len(required) <= 1 and not _are_columns(inputs, samples)
    return "positions" if fits and several and not is_rows else "whole"


def _parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """List what ``forward`` takes; a compiled model takes what the model below it does."""
    original = getattr(model, "_orig_mod", model)
    try:
        return list(inspect.signature(original.forward).parameters.values())
    except (TypeError, ValueError):  # a forward that is not written in Python
        return []


def _are_columns(inputs: list[Any] | tuple[Any, ...], samples: int) -> bool:
    """Whether each entry has a row for every sample, rather than each sample an entry."""
    return all(
        isinstance(each, torch.Tensor) and each.ndim > 0 and len(each) == samples for each in inputs
    )
