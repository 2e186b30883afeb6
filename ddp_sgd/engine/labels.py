"""Labels: whether a data set lists them, and whether the model has a score for each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ddp_sgd.errors import DataError


def is_classification(outputs: Any, targets: Any) -> bool:
    """Whether outputs are scores of shape (m, C), C > 1, for integer targets of shape (m,)."""
    return (
        isinstance(outputs, torch.Tensor)
        and isinstance(targets, torch.Tensor)
        and outputs.ndim == 2
        and outputs.shape[1] > 1
        and targets.shape == outputs.shape[:1]
        and not targets.is_floating_point()
    )


def listed_targets(dataset: Any, targets: Any, indices: Sequence[int]) -> torch.Tensor | None:
    """Return the targets of all samples, where a data set lists them as it gives them; else None.

    The list counts only if it equals the targets that were read: a transform may change those.

    Args:
        dataset: Data set with an attribute ``targets``, as torchvision's have, or torch's own.
        targets: Targets of some samples; only integers of shape (m,) are looked for.
        indices: Which samples.
    """
    listed = getattr(dataset, "targets", None)
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
    return labels if torch.equal(labels[indices].to(targets), targets) else None


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
