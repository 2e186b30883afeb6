"""Loss functions as sums over units, so that any split over ranks and micro-batches is exact."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from types import FunctionType
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.named_losses import LOSS, ONE_NUMBER, LossForm, read_units, units_of, wide_float

LossFunction = Callable[..., Any]
"""Gives a tensor without dimensions, or a mapping of such, for (outputs, targets); for (outputs)
where there are no targets."""

Spread = Literal["whole", "positions", "keywords"]
"""How inputs reach a model: as one argument, as positional ones, or as keyword arguments."""

_PER_TARGET = (nn.CrossEntropyLoss, nn.NLLLoss)
_OF_CLASSES = (*_PER_TARGET, nn.MultiMarginLoss)

_MODULES: dict[Any, type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.nll_loss: nn.NLLLoss,
}
"""Functions that are the forward pass of a module, whose units are known."""

_MEANS = ("mean", "batchmean")


class Objective:
    """What the run minimizes: the loss summed over the units of a step, by their number.

    A unit is a sample, for a loss that gives the mean over samples. torch's own cross entropy with
    class weights, with ignored targets or with one target per pixel or token divides by the weight
    of the targets instead; then that weight is the unit, since only so a split over ranks equals
    the whole. A subclass with a ``forward`` of its own is assumed to be a mean over samples. A loss
    with a method ``units`` is a mean over the units that this gives.

    Args:
        loss: Module or function of (outputs, targets) that returns the mean, a tensor without
            dimensions, or several by name.
        targets: Targets of the data set, to choose which kind of unit applies.
        complete: Whether these are all targets, so that no ignored one can occur later.
        takes_classes: Whether targets are indices of the model's outputs; None: by the type of the
            loss.
        spread: How inputs reach the model.
        form: What the loss returns.
        counts_correct: Whether ``accuracy`` is logged in training.

    Raises:
        ConfigError: The loss is set to return something else than a mean.

    Attributes:
        form: The same.
        counts_correct: The same.
        gives_units: Whether the loss itself gives the units of a micro-batch.
        ignore_index: Target that the loss leaves out.
        counts_samples: Whether the unit is a sample, whose number every rank knows.
        takes_classes: Whether targets are class indices, so that there is an accuracy.
    """

    def __init__(
        self,
        loss: LossFunction,
        targets: Any,
        *,
        complete: bool = True,
        takes_classes: bool | None = None,
        spread: Spread = "whole",
        form: LossForm = ONE_NUMBER,
        counts_correct: bool = False,
    ) -> None:
        refuse_reduction(loss)
        loss = as_module(loss)
        self.form = form
        self.counts_correct = counts_correct
        self.gives_units = units_of(loss) is not None
        weighs = not self.gives_units and _weighs_targets(loss, targets, complete=complete)
        self.counts_samples = not (self.gives_units or weighs)
        self.ignore_index: int = getattr(loss, "ignore_index", -100)
        known = is_of_classes(loss)
        self.takes_classes = bool(known if takes_classes is None else takes_classes)
        self._spread = spread
        self._loss: Any = loss
        if weighs:
            self._loss = copy.copy(loss)
            self._loss.reduction = "sum"
            weight = self._loss.weight
            self._weight = None if weight is None else weight.detach().double().cpu()
            self._weight_on: dict[torch.device, torch.Tensor] = {}

    def outputs(self, model: nn.Module, inputs: Any, targets: Any = None) -> Any:
        """Call the model.

        Args:
            model: The model or its wrapper.
            inputs: What the data set gave: a tensor, or a container, which is spread over the
                arguments of ``forward`` where that takes several.
            targets: What the data set gave, for a model whose output is the loss: its last
                argument, or the one named ``targets``. Other models do not get it.
        """
        is_needed = targets is not None and isinstance(self._loss, ModelLoss)
        if self._spread == "keywords":
            return model(**inputs, targets=targets) if is_needed else model(**inputs)
        arguments = inputs if self._spread == "positions" else (inputs,)
        return model(*arguments, targets) if is_needed else model(*arguments)

    def values(self, outputs: Any, targets: Any) -> dict[str, torch.Tensor]:
        """Compute the loss of a micro-batch, and the numbers that are logged with it.

        Args:
            outputs: What the model returned.
            targets: What the data set gave; None: there are no targets.

        Returns:
            Tensors without dimensions by name: ``loss``, and those of ``form.names``. Each times
            ``weight`` is a sum over units, unless the loss gives these.

        Raises:
            ConfigError: The loss gives another form than before the run.
        """
        return self.form.values(call_loss(self._loss, outputs, targets))

    def __call__(self, outputs: Any, targets: Any) -> torch.Tensor:
        """Compute the loss alone; see ``values``."""
        return self.values(outputs, targets)[LOSS]

    def given_units(
        self, targets: Any, samples: int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Return the units of a micro-batch that the loss itself gives, by name of its numbers.

        Args:
            targets: What the data set gave, on the device.
            samples: True number of samples; with 0 the result is 0.
            device: Where the model is.

        Raises:
            ConfigError: The loss gives no units that can be used; see ``read_units``.
        """
        units = read_units(self._loss.units(targets), self.form, device)
        return units if samples else {name: torch.zeros_like(each) for name, each in units.items()}

    def weight(self, samples: int) -> int:
        """Return the factor of a micro-batch's loss: its samples for a mean, 1 for a sum.

        Args:
            samples: True number of samples; with 0 the result is 0.
        """
        return samples if self.counts_samples else min(samples, 1)

    def units(self, targets: torch.Tensor, samples: int) -> float:
        """Count the units of a micro-batch, for a loss that weighs targets.

        Args:
            targets: Integer tensor of shape (m, ...); on the host no device is waited for.
            samples: True number of samples; with 0 the result is 0.

        Raises:
            DataError: There is no class weight for a target.
        """
        targets = targets.cpu()  # a data set may be on a device
        if self._weight is None:  # numpy counts a small batch in a third of the time
            ignored = np.count_nonzero(targets.numpy() == self.ignore_index)
            return float((targets.numel() - ignored) * min(samples, 1))
        counted = targets[targets != self.ignore_index]
        if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < len(
            self._weight
        ):
            raise DataError(
                f"a batch has labels from {int(counted.min())} to {int(counted.max())} while the "
                f"loss has {len(self._weight)} class weights; number the labels from 0, or give "
                "the loss a weight for each class."
            )
        return float(self._weight[counted].sum()) * min(samples, 1)

    def units_on_device(self, targets: torch.Tensor, samples: int) -> torch.Tensor:
        """Count the units of a micro-batch where its targets are, without waiting for the device.

        A target without a class weight counts as the nearest that has one: the loss reports it.

        Args:
            targets: Integer tensor of shape (m, ...).
            samples: True number of samples; with 0 the result is 0.

        Returns:
            Tensor without dimensions, of the widest float type of the device.
        """
        counts = targets != self.ignore_index
        wide = wide_float(targets.device)
        if self._weight is not None:
            known = targets.clamp(0, len(self._weight) - 1).flatten()
            weights = self._weight_at(targets.device).index_select(0, known)
            return (weights * counts.flatten()).sum() * min(samples, 1)
        return counts.sum(dtype=wide) * min(samples, 1)

    def _weight_at(self, device: torch.device) -> torch.Tensor:
        """Return the class weights on a device; they are copied once."""
        if device not in self._weight_on and self._weight is not None:
            self._weight_on[device] = self._weight.to(device, wide_float(device))
        return self._weight_on[device]


class ModelLoss:
    """The loss of a model whose output is the loss already, as ``loss: null`` has it."""

    def __call__(self, outputs: Any, targets: Any = None) -> Any:  # noqa: ARG002
        """Return what the model returned."""
        return outputs


_KNOWN: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Losses whose signature was looked at, which takes longer than a small layer."""


def call_loss(loss: LossFunction, outputs: Any, targets: Any) -> Any:
    """Call a loss: with outputs alone where there are no targets, unless it takes both."""
    if targets is None and not _takes_both(loss):
        return cast("Callable[[Any], Any]", loss)(outputs)
    return loss(outputs, targets)


def _takes_both(loss: Any) -> bool:
    """Whether a loss has two positional arguments without a default value."""
    with suppress(KeyError, TypeError):  # not known yet, or no key of a dictionary
        return _KNOWN[loss]
    function = loss.forward if isinstance(loss, nn.Module) else loss
    takes_both = False
    try:
        inspect.signature(function).bind(None)
    except TypeError:
        takes_both = True
    except ValueError:  # a function that is not written in Python
        pass
    with suppress(TypeError):
        _KNOWN[loss] = takes_both
    return takes_both


def refuse_reduction(loss: LossFunction) -> None:
    """Refuse a loss of torch that is set to something else than a mean.

    A subclass with a ``forward`` of its own may use the setting for a part of its work.

    Raises:
        ConfigError: ``reduction`` is ``sum`` or ``none``.
    """
    module = as_module(loss)
    reduction = getattr(module, "reduction", "mean")
    if has_forward_of_torch(module) and reduction not in _MEANS:
        raise ConfigError(
            f"loss.init_args.reduction is {reduction}; leave it at mean: the run weights "
            "every micro-batch itself."
        )


def as_module(loss: LossFunction) -> LossFunction:
    """Return torch's module for one of its functions, also for a partial; others as they are."""
    options: dict[str, Any] = {}
    function: Any = loss
    if isinstance(loss, partial) and not loss.args:
        function, options = loss.func, loss.keywords
    kind = _MODULES.get(function) if inspect.isfunction(function) else None
    if kind is None or not set(options) <= set(inspect.signature(kind).parameters):
        return loss
    return kind(**options)


def has_forward_of_torch(loss: LossFunction) -> bool:
    """Whether a loss is a module of torch, or a subclass that computes the same."""
    return (
        isinstance(loss, nn.Module)
        and "forward" not in vars(loss)
        and getattr(type(loss).forward, "__module__", "") == nn.CrossEntropyLoss.__module__
    )


def is_of_classes(loss: LossFunction) -> bool | None:
    """Whether integer targets of a loss are class indices; None if its type does not define it."""
    module = as_module(loss)
    if not has_forward_of_torch(module):
        return None
    return isinstance(module, _OF_CLASSES)


def is_mean_of_units(loss: LossFunction) -> bool:
    """Whether it is known that a loss can be split into its units."""
    module = as_module(loss)
    return isinstance(module, _PER_TARGET) and has_forward_of_torch(module)


def loss_modules(loss: LossFunction, model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules of a loss that are not parts of the model.

    Args:
        loss: A module, or a function that holds modules: bound, in a partial, in an attribute, in
            a closure, or by the name of a global variable.
        model: The model that is trained.

    Returns:
        The modules by where they were found; the loss itself as ``loss``.
    """
    known = set(model.modules())
    found: dict[str, nn.Module] = {}
    for name, value in _held_by(loss):
        if isinstance(value, nn.Module) and value not in known:
            found[name] = value
            known.update(value.modules())
    return found


def _held_by(loss: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a callable holds, with its name there."""
    if isinstance(loss, nn.Module):
        yield "loss", loss
        return
    if isinstance(loss, partial):
        yield from _held_by(loss.func)
        yield from ((f"argument {number}", value) for number, value in enumerate(loss.args))
        yield from loss.keywords.items()
        return
    if inspect.ismethod(loss):
        yield "loss", loss.__self__
        loss = loss.__self__
    if inspect.isfunction(loss):
        yield from _variables_of(loss)
    yield from getattr(loss, "__dict__", {}).items()


def _variables_of(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables from outside that a function uses."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # a variable that has no value yet
            yield name, cell.cell_contents
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]


def _weighs_targets(loss: LossFunction, targets: Any, *, complete: bool) -> bool:
    if not is_mean_of_units(loss) or not isinstance(targets, torch.Tensor):
        return False
    if targets.is_floating_point():  # probabilities: torch takes the mean over samples
        return False
    module: Any = loss
    ignores = not complete or bool((targets == module.ignore_index).any())
    return module.weight is not None or ignores or targets.ndim > 1
