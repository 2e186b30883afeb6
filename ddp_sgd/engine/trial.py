"""A look at data, model and loss before the run: what does not fit is found and named."""

import warnings
from collections.abc import Sized
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

from ddp_sgd.data.fetching import EVAL_EPOCH, Fetcher, Request, Unreadable
from ddp_sgd.data.loading import move
from ddp_sgd.engine.evaluation import evaluating, is_classification
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.losses import LossFunction, Objective


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


def try_out(
    model: nn.Module, loss: LossFunction, dataset: Any, where: str, device: torch.device
) -> Objective:
    """Send the first two samples through model and loss, without a trace.

    Args:
        model: On the device; its mode, weights and buffers stay as they are.
        loss: Module or function of (outputs, targets).
        dataset: Map-style data set with at least one sample.
        where: Its key, for errors.
        device: Where to compute.

    Returns:
        The loss, as the sum over units that it is made of.

    Raises:
        DataError: The samples cannot be read, or labels lie out of range.
        ConfigError: Model, loss and samples do not fit together.
    """
    request = Request(EVAL_EPOCH, np.arange(min(2, len(dataset))))
    batch = Fetcher(dataset, where, seed=0).__getitems__(request)
    if isinstance(batch, Unreadable):
        raise DataError(batch.message)
    inputs, targets = (move(part, device) for part in batch)
    listed = listed_targets(dataset, targets)
    complete = listed is not None
    objective = Objective(loss, listed if complete else targets, complete=complete)
    with evaluating(model):
        outputs = _call_model(model, inputs)
        if is_classification(outputs, targets):
            labels = targets if listed is None else listed
            check_labels(labels[labels != objective.ignore_index], outputs.shape[1], where)
        total = _call_loss(objective, outputs, targets, len(request.indices))
    if not isinstance(total, torch.Tensor) or total.ndim:
        raise ConfigError(
            f"loss is {type(loss).__name__}, which gives {describe(total)}; let it give the mean "
            "over samples, a tensor without dimensions."
        )
    return objective


def listed_targets(dataset: Any, targets: Any) -> torch.Tensor | None:
    """Return the targets of all samples, where a data set lists them; else None.

    Args:
        dataset: Data set with an attribute ``targets``, as torchvision's have, or torch's own.
        targets: A batch of them; only integer targets of shape (m,) are looked for.
    """
    listed = getattr(dataset, "targets", None)
    if isinstance(dataset, TensorDataset):
        listed = dataset.tensors[-1]
    if listed is None or not isinstance(targets, torch.Tensor) or targets.is_floating_point():
        return None
    try:
        labels = torch.as_tensor(listed)
    except (TypeError, ValueError, RuntimeError):  # lists of something else than numbers
        return None
    fits = labels.shape == (len(dataset),) and not labels.is_floating_point()
    return labels if fits else None


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


def describe(value: Any) -> str:
    """Say what a value is, for an error: the shape and type of a tensor, else its class."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def _call_model(model: nn.Module, inputs: Any) -> Any:
    try:
        return model(inputs)
    except Exception as error:  # whatever a user's model raises
        raise ConfigError(
            f"model is {type(model).__name__}, which fails on inputs of {describe(inputs)}, "
            f"{type(error).__name__}: {error}; make model.init_args fit the data, or transform "
            "the data."
        ) from error


def _call_loss(objective: Objective, outputs: Any, targets: Any, samples: int) -> Any:
    try:
        with warnings.catch_warnings():
            # Shapes that torch stretches to fit give a loss over pairs that nobody meant.
            warnings.filterwarnings("error", message="Using a target size")
            return objective.total(outputs, targets, samples)
    except Exception as error:  # whatever a user's loss raises
        raise ConfigError(
            f"the model gives {describe(outputs)}, which does not fit targets of "
            f"{describe(targets)}, {type(error).__name__}: {error}; change the last layer of the "
            "model, the loss or the targets."
        ) from error
