"""Loss reduction by experiment: a mean over samples, a sum, or something that cannot be split.

A loss of a user's own does not state its reduction. So the loss of a batch is compared with those
of its samples, on random outputs, since those of the model may be special: zero at the start, or
saturated at the end of a run.

Labels: whether a data set lists them, and whether the model has a score for each.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import TensorDataset

from ddp_sgd.errors import DataError
from ddp_sgd.losses import LossFunction, call_loss
from ddp_sgd.tree import map_tensors

Reduction = Literal["mean", "sum", "other"]

_DRAWS = 3


class LossKind(NamedTuple):
    """What an experiment found out about a loss.

    Args:
        reduction: ``mean`` if the loss of a batch is the mean of those of its samples, ``sum`` if
            it is their sum, ``other`` if it is neither, such as for losses of pairs of samples.
        takes_classes: Whether integer targets of shape (m,) are indices into outputs of shape
            (m, C).
    """

    reduction: Reduction
    takes_classes: bool


def examine_loss(
    loss: LossFunction, outputs: Any, targets: Any, targets_of_one: Sequence[Any]
) -> LossKind:
    """Compare the loss of a batch with those of its samples, on three draws of outputs.

    Args:
        loss: Gives a tensor without dimensions for (outputs, targets).
        outputs: What the model gave for a batch, as an example of shapes and types.
        targets: Targets of the batch.
        targets_of_one: Targets of batches of one sample each, of the same samples.
    """
    samples = len(targets_of_one)
    spread = _Draws(loss, outputs, targets, samples, scale=1.0)  # losses that differ by sample
    found = set()
    for drawn, value in zip(spread.outputs, spread.values, strict=True):
        parts = [
            _value(loss, _sample_of(drawn, samples, number), target)
            for number, target in enumerate(targets_of_one)
        ]
        if reduction := _reduction(value, parts):
            found.add(reduction)
    if not spread.outputs:  # the loss works on nothing but the model's own outputs
        return LossKind("other", takes_classes=False)
    reduction = found.pop() if len(found) == 1 else "other" if found else "mean"
    near_zero = _Draws(loss, outputs, targets, samples, scale=0.1)  # where losses have a gradient
    return LossKind(reduction, _takes_classes(loss, near_zero.outputs, targets))


class _Draws:
    """Three draws of outputs on which a loss gives finite numbers.

    Scores are drawn first; probabilities, for losses that take nothing else; then the model's
    outputs are given to other samples. 16 bits are too few to compare sums: there is a second try
    with the type of the model's outputs only if a loss does not work on 32 bits.

    Attributes:
        outputs: The draws; empty if the loss gives no finite numbers on any of them.
        values: The loss of each of them.
    """

    def __init__(
        self, loss: LossFunction, outputs: Any, targets: Any, samples: int, *, scale: float
    ) -> None:
        self.outputs: list[Any] = []
        self.values: list[torch.Tensor] = []
        normal = partial(
            _random, draw=lambda *args, **options: scale * torch.randn(*args, **options)
        )
        uniform = partial(_random, draw=_probabilities)
        for example in (_widened(outputs), outputs):
            for draw in (normal, uniform, _shuffled):
                drawn = [draw(example, samples, number) for number in range(_DRAWS)]
                values = [_value(loss, each, targets) for each in drawn]
                if all(value is not None for value in values):
                    self.outputs = drawn
                    self.values = [value for value in values if value is not None]
                    return


def _value(loss: LossFunction, outputs: Any, targets: Any) -> torch.Tensor | None:
    """Compute a loss; None if that fails, or gives no finite number."""
    try:
        with torch.no_grad():
            value = call_loss(loss, outputs, targets).detach()
    except Exception:  # any error of a user's loss on outputs that are not the model's
        return None
    return value if value.ndim == 0 and bool(value.isfinite()) else None


def _reduction(whole: torch.Tensor, parts: Sequence[torch.Tensor | None]) -> Reduction | None:
    """Judge one draw; None if mean and sum are too close to distinguish, such as where all is zero.

    Values of the same loss differ by rounding: by the square root of the unit of their type at
    most, which leaves room for sums of some thousand terms.
    """
    known = [part.double() for part in parts if part is not None]
    if len(known) < len(parts):
        return "other"
    values, value = torch.stack(known), whole.double()
    tolerance = torch.finfo(whole.dtype).eps ** 0.5 * values.abs().max()
    is_mean = bool((value - values.mean()).abs() <= tolerance)
    is_sum = bool((value - values.sum()).abs() <= tolerance * len(parts))
    if is_mean and is_sum:
        return None
    return "mean" if is_mean else "sum" if is_sum else "other"


def _takes_classes(loss: LossFunction, draws: Sequence[Any], targets: Any) -> bool:
    """Whether the loss wants a larger score of the target class, more than of any other.

    The gradient of a score of shape (m, C) then has its minimum at the target in every row. Of
    embeddings, which the loss compares with each other, that holds by chance only.
    """
    rows = 0
    for drawn in draws:
        if not is_classification(drawn, targets):
            return False
        scores = drawn.detach().clone().requires_grad_()
        try:
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(scores, targets), scores)
        except Exception:  # any error of a user's loss
            return False
        counted = (gradient != 0).any(dim=1) & (targets >= 0)
        if bool((gradient.argmin(dim=1) != targets)[counted].any()):
            return False
        rows += int(counted.sum())
    return rows > 0


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


def _widened(outputs: Any) -> Any:
    """Convert tensors of 16 bits to 32."""
    narrow = (torch.bfloat16, torch.float16)
    return map_tensors(lambda t: t.detach().float() if t.dtype in narrow else t, outputs)


def _random(outputs: Any, samples: int, number: int, *, draw: Callable[..., torch.Tensor]) -> Any:
    """Draw outputs, by a function of torch such as ``torch.rand``."""
    generator = torch.Generator().manual_seed(number)

    def drawn(tensor: torch.Tensor) -> torch.Tensor:
        return draw(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)

    return _change(outputs, samples, drawn)


def _probabilities(*args: Any, **options: Any) -> torch.Tensor:
    return 0.1 + 0.8 * torch.rand(*args, **options)


def _shuffled(outputs: Any, samples: int, number: int) -> Any:
    """Give the model's outputs to other samples."""

    def roll(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.roll(number, dims=_batch_dim(tensor, samples) or 0)

    return _change(outputs, samples, roll)


def _change(value: Any, samples: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change the floating-point tensors that have a row for each sample, in any containers."""

    def changed(tensor: torch.Tensor) -> torch.Tensor:
        has_rows = tensor.is_floating_point() and _batch_dim(tensor, samples) is not None
        return change(tensor.detach()) if has_rows else tensor.detach()

    return map_tensors(changed, value)


def _sample_of(outputs: Any, samples: int, number: int) -> Any:
    """Cut the outputs of one sample out of those of a batch."""

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        dim = _batch_dim(tensor, samples)
        return tensor if dim is None else tensor.narrow(dim, number, 1)

    return map_tensors(cut, outputs)


def _batch_dim(tensor: torch.Tensor, samples: int) -> int | None:
    """Find the dimension that has as many entries as there are samples, the first if several."""
    return next((dim for dim, size in enumerate(tensor.shape) if size == samples), None)


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
