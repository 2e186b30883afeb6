"""Loss reduction by experiment: a mean over samples, a sum, or something that cannot be split.

A loss of a user's own does not state its reduction. So the loss of a batch is compared with those
of its samples, on random outputs, since those of the model may be special: zero at the start, or
saturated at the end of a run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from ddp_sgd.distributed.collectives import gather_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.labels import is_classification
from ddp_sgd.errors import ConfigError
from ddp_sgd.losses import (
    LossFunction,
    ModelLoss,
    as_module,
    call_loss,
    has_forward_of_torch,
    is_of_classes,
)
from ddp_sgd.named_losses import LossForm, form_of, read_units, units_of
from ddp_sgd.tree import describe, map_tensors

Reduction = Literal["mean", "sum", "other"]

_DRAWS = 3

_HOST = torch.device("cpu")


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
    loss: LossFunction,
    outputs: Any,
    targets: Any,
    targets_of_one: Sequence[Any],
    units: Callable[[Any], float] | None = None,
) -> LossKind:
    """Compare the loss of a batch with those of its samples, on three draws of outputs.

    Args:
        loss: Gives a tensor without dimensions for (outputs, targets).
        outputs: What the model gave for a batch, as an example of shapes and types.
        targets: Targets of the batch.
        targets_of_one: Targets of batches of one sample each, of the same samples.
        units: Gives the weight of a sample, for its target; None: they weigh the same.
    """
    samples = len(targets_of_one)
    weights = [1.0 if units is None else units(target) for target in targets_of_one]
    spread = _Draws(loss, outputs, targets, samples, scale=1.0)  # losses that differ by sample
    found = set()
    for drawn, value in zip(spread.outputs, spread.values, strict=True):
        parts = [
            _value(loss, _sample_of(drawn, samples, number), target) if weights[number] else None
            for number, target in enumerate(targets_of_one)
        ]
        if reduction := _reduction(value, parts, weights):
            found.add(reduction)
    if not spread.outputs:  # the loss works on nothing but the model's own outputs
        return LossKind("other", takes_classes=False)
    reduction = found.pop() if len(found) == 1 else "other" if found else "mean"
    near_zero = _Draws(loss, outputs, targets, samples, scale=0.1)  # where losses have a gradient
    return LossKind(reduction, _takes_classes(loss, near_zero.outputs, targets))


def examine_parts(
    loss: LossFunction, form: LossForm, outputs: Any, targets: Any, targets_of_one: Sequence[Any]
) -> LossKind:
    """Examine each number of a loss, by the units that the loss gives.

    Args:
        loss: See ``examine_loss``; it may return several numbers by name.
        form: What it returns.
        outputs: See ``examine_loss``.
        targets: See ``examine_loss``.
        targets_of_one: See ``examine_loss``.

    Returns:
        What the numbers that are trained are, ``other`` if they differ; and whether targets are
        classes for any number, as for the labels in a distillation.
    """

    def part(name: str, outputs: Any, targets: Any) -> torch.Tensor:
        return form.values(call_loss(loss, outputs, targets))[name]

    def weight(name: str, targets: Any) -> float:
        return float(read_units(given(targets), form, _HOST)[name]) if given else 1.0

    def examine(name: str) -> LossKind:
        parts = outputs, targets, targets_of_one
        return examine_loss(partial(part, name), *parts, units=partial(weight, name))

    given = units_of(loss)
    kinds = [examine(name) for name in form.trained]
    reductions = {kind.reduction for kind in kinds}
    others = (name for name in form.names if name not in form.trained)
    takes_classes = any(kind.takes_classes for kind in kinds) or any(
        examine(name).takes_classes for name in others
    )
    return LossKind(reductions.pop() if len(reductions) == 1 else "other", takes_classes)


def find_form(loss: LossFunction, returned: Any, targets: Any, device: torch.device) -> LossForm:
    """Find out the form of a loss from what it returned for a batch, and check its units.

    Args:
        loss: The loss.
        returned: What it returned.
        targets: Targets of the batch.
        device: Where the model is.

    Raises:
        ConfigError: The loss returns something else than numbers, or gives units that cannot be
            used: none at all in the batch, or a negative number.
    """
    is_model = isinstance(loss, ModelLoss)
    who = "loss is null while the model" if is_model else f"loss is {name_of(loss)}, which"
    form, units = form_of(returned, who, device), units_of(loss)
    if units is None:
        return form
    try:
        given = units(targets)
    except Exception as error:  # any error of a user's method
        raise ConfigError(
            f"loss.units fails on targets of {describe(targets)}, {type(error).__name__}: {error}; "
            "let it give the weight of a micro-batch."
        ) from error
    form = replace(form, units_by_name=isinstance(given, Mapping))
    counts = read_units(given, form, device)
    total = sum(float(counts[name]) for name in form.trained)
    if not total > 0:
        raise ConfigError(
            f"loss.units gives {total:g} for a batch of the first samples, which then count for "
            "nothing; let it give the weight of a micro-batch, such as its number of samples."
        )
    return form


def require_same_form(form: LossForm, runtime: Runtime) -> None:
    """Compare the form of the loss between ranks; all of them call this.

    Raises:
        ConfigError: It differs.
    """
    for rank, other in enumerate(gather_over_ranks(form, runtime)):
        if other != form:
            raise ConfigError(
                f"loss gives {', '.join(form.names) or 'one number'} on rank {runtime.rank} and "
                f"{', '.join(other.names) or 'one number'} on rank {rank}; let it give the same "
                "names, and the same kind of units, everywhere."
            )


def judge_loss(
    loss: LossFunction, form: LossForm, outputs: Any, targets: Any, targets_of_one: Sequence[Any]
) -> tuple[bool, tuple[str, ...]]:
    """Find out whether targets are classes, and what the user should know of the loss.

    Args:
        loss: See ``examine_loss``; it may return several numbers by name.
        form: What it returns.
        outputs: See ``examine_loss``.
        targets: See ``examine_loss``.
        targets_of_one: See ``examine_loss``.

    Returns:
        Whether targets are class indices, and notes.

    Raises:
        ConfigError: The loss is a sum over samples.
    """
    notes = _form_notes(form)
    is_known = has_forward_of_torch(as_module(loss)) and units_of(loss) is None
    if is_known or isinstance(loss, ModelLoss):
        return bool(is_of_classes(loss)), notes
    kind = examine_parts(loss, form, outputs, targets, targets_of_one)
    if kind.reduction == "sum":
        raise ConfigError(
            f"loss is {name_of(loss)}, which gives the sum over the samples of a batch; let it "
            "give their mean: the run weights every micro-batch itself."
        )
    if kind.reduction == "other":
        notes = (*notes, _depends_on_split(loss))
    return kind.takes_classes, notes


def refuse_accuracy(loss: LossFunction, outputs: Any, targets: Any, *, takes_classes: bool) -> None:
    """Refuse to log the accuracy of what is no classification.

    Raises:
        ConfigError: It is none.
    """
    if not (takes_classes and is_classification(outputs, targets)):
        raise ConfigError(
            f"log.train_accuracy is true while the model gives {describe(outputs)} for targets of "
            f"{describe(targets)} and the loss is {name_of(loss)}, which is no classification; set "
            "log.train_accuracy=false."
        )


def _form_notes(form: LossForm) -> tuple[str, ...]:
    """Describe what is trained, and what is logged, of a loss with several numbers."""
    if form.adds_up:
        return (f"the loss is the sum of {', '.join(form.names)}, which are logged, too",)
    return (f"logged with the loss: {', '.join(form.names)}",) if form.names else ()


def _depends_on_split(loss: LossFunction) -> str:
    return (
        f"the loss of a batch is not the mean of those of its samples ({name_of(loss)}), such as "
        "for pairs within the batch or weighted means; it is trained as a mean, and a step then "
        "depends on how the batch is split over ranks and micro-batches. A weighted mean becomes "
        "exact by a method units(targets) of the loss, which gives the weight of a micro-batch"
    )


def name_of(loss: Any) -> str:
    """Name a loss for an error."""
    if isinstance(loss, ModelLoss):
        return "null"
    return getattr(loss, "__qualname__", type(loss).__name__)


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


def _reduction(
    whole: torch.Tensor, parts: Sequence[torch.Tensor | None], weights: Sequence[float]
) -> Reduction | None:
    """Judge one draw; None if mean and sum are too close to distinguish, such as where all is zero.

    Samples without a weight are left out. Values of the same loss differ by rounding: by the square
    root of the unit of their type at most, which leaves room for sums of some thousand terms.
    """
    known = [part.double() for part in parts if part is not None]
    counted = torch.tensor([weight for weight in weights if weight], dtype=torch.float64)
    if len(known) < len(counted) or not known:
        return "other"
    values, value = torch.stack(known), whole.double()
    mean = (values * counted.to(values)).sum() / counted.sum()
    tolerance = torch.finfo(whole.dtype).eps ** 0.5 * values.abs().max()
    is_mean = bool((value - mean).abs() <= tolerance)
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
