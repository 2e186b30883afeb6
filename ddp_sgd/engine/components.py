"""The components of a run: model, loss and data, given or built from the configuration.

Lazy modules are materialized by one forward pass before anything is compared or restored.

Sample batch: a few samples for such checks, and how they become arguments of the model's forward.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ddp_sgd.config.component import Component
from ddp_sgd.config.sections import DataConfig
from ddp_sgd.data.dataset_checks import OpenFiles
from ddp_sgd.data.device import move
from ddp_sgd.data.fetcher import EVAL_EPOCH, Collate, Fetcher, Request, Unreadable
from ddp_sgd.data.order import Order
from ddp_sgd.data.selection import Selection
from ddp_sgd.engine.data_sets import gather_data
from ddp_sgd.engine.evaluation import evaluating
from ddp_sgd.engine.model_check import check_loss_parameters, check_model
from ddp_sgd.engine.reading import Reading, build_reading
from ddp_sgd.engine.side_effects import undo_side_effects
from ddp_sgd.engine.train_state import describe_loss
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.instantiate import instantiate
from ddp_sgd.losses import LossFunction, ModelLoss, Objective, Spread, as_module, loss_modules
from ddp_sgd.seeds import seed_for

_HOST = torch.device("cpu")

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


def read_batch(
    dataset: Any,
    where: str,
    *,
    batch_size: int,
    collate: Collate | None,
    selection: Selection | None = None,
) -> Batch:
    """Read a few samples, spread over a data set, in the way of an evaluation.

    Args:
        dataset: Map-style data set with at least one sample.
        where: Its key, for errors.
        batch_size: Samples of a micro-batch.
        collate: Function from a list of samples to a batch; None: torch's default_collate.
        selection: Chooses input and target of a sample; None: samples are pairs.

    Raises:
        DataError: The samples cannot be read.
    """
    samples = min(len(dataset), max(2, min(_MOST_SAMPLES, batch_size)))
    indices = np.linspace(0, len(dataset) - 1, samples).astype(np.int64)
    fetcher = Fetcher(dataset, where, 0, collate, selection)
    read = fetcher.read_with_singles(Request(EVAL_EPOCH, indices))
    if isinstance(read, Unreadable):
        raise DataError(read.message)
    (inputs, targets), singles = read
    return Batch(inputs, targets, [target for _, target in singles], indices.tolist())


def read_sample_batch(
    dataset: Any, where: str, reading: "Reading", device: torch.device = _HOST
) -> Batch:
    """Read a few samples, and have the transforms of training or evaluation applied to them.

    Args:
        dataset: Map-style data set with at least one sample.
        where: Its key; the transforms of training belong to ``data.train``.
        reading: How samples are read.
        device: Where they are transformed, and the inputs stay.

    Raises:
        ConfigError: A transform fails, or does not keep to its interface.
        DataError: The samples cannot be read.
    """
    size, transforms, epoch = reading.batch_size, reading.train_transforms, 0
    if where != "data.train":
        size, transforms, epoch = reading.chunk_size, reading.eval_transforms, EVAL_EPOCH
    batch = read_batch(
        dataset, where, batch_size=size, collate=reading.collate, selection=reading.selection
    )
    inputs = move(batch.inputs, device)
    return batch._replace(inputs=transforms.check(inputs, np.array(batch.indices), epoch))


def spread_for(model: nn.Module, loss: LossFunction, batch: Batch) -> Spread:
    """Choose how the inputs of a batch reach a model, which may take the targets after them."""
    is_last = isinstance(loss, ModelLoss) and batch.targets is not None
    return choose_spread(model, batch.inputs, len(batch.indices), takes_targets=is_last)


def choose_spread(
    model: nn.Module, inputs: Any, samples: int, *, takes_targets: bool = False
) -> Spread:
    """Choose how inputs reach a model, by the signature of its ``forward``.

    A mapping becomes keyword arguments, and a list or tuple positional ones, where ``forward``
    takes several arguments that these fit. A list of one entry per sample, as detection models
    take, is one argument.

    Args:
        model: The model.
        inputs: Inputs of a batch.
        samples: Samples in it.
        takes_targets: Whether the last argument of ``forward`` is for the targets.
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
    positional = positional[:-1] if takes_targets else positional
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


def is_materialized(model: nn.Module) -> bool:
    """Whether all parameters and buffers have a shape."""
    return not _lazy_names(model)


def materialize(
    model: nn.Module, inputs: Any, call: Callable[[nn.Module, Any], Any], seed: int
) -> None:
    """Give lazy parameters their shapes and first values, which follow from the seed alone.

    Args:
        model: The model, on any device; only its lazy modules change.
        inputs: Inputs of a batch, on the host.
        call: Calls the model with such inputs.
        seed: Seed of the weights.

    Raises:
        ConfigError: The model fails, or leaves lazy modules out.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with undo_side_effects([model], [torch.default_generator]), evaluating(model):
        torch.manual_seed(seed)
        call(model, move(inputs, device))
    if names := _lazy_names(model):
        raise ConfigError(
            f"model.{names[0]} is not initialized by a forward pass in evaluation mode; run the "
            "model once before the training, or give that layer its sizes."
        )


def _lazy_names(model: nn.Module) -> list[str]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if is_lazy(tensor)]


class Given(NamedTuple):
    """What the caller of ``fit`` brings; the configuration describes the rest.

    Args:
        model: Module to train.
        loss: Module or function of (outputs, targets).
        train_set: Map-style data set of (input, target).
        eval_set: The same, held out, or several by name.
        test_set: The same, scored once at the end.
    """

    model: nn.Module | None = None
    loss: LossFunction | None = None
    train_set: Any = None
    eval_set: Any = None
    test_set: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """What the user brings: a model, a loss and data, on the host.

    Args:
        model: Module to train.
        loss: Module or function of (outputs, targets).
        loss_name: What the loss is, from ``describe_loss``.
        train_set: Map-style data set of (input, target).
        eval_sets: The same, held out, by key: ``data.eval``, or ``data.eval.NAME`` of several, in
            order; empty: the run trains without evaluation.
        test_sets: The same, scored once at the end, by key: ``data.test``; empty: there is none.
        reading: How samples are read.
        files: What the data sets have opened since nothing was read from them.
        order: Which training samples make a step; None: a permutation for each epoch.
        counts_correct: Whether training logs its accuracy.
    """

    model: nn.Module
    loss: LossFunction
    loss_name: str
    train_set: Any
    eval_sets: Mapping[str, Any]
    test_sets: Mapping[str, Any]
    reading: Reading
    files: OpenFiles = field(default_factory=OpenFiles)
    order: Order | None = None
    counts_correct: bool = False

    def close_before_fork(self) -> None:
        """Close what a look at the data has opened, if loader processes will read them."""
        if self.reading.workers:
            self.files.close()


def gather_components(
    given: Given,
    *,
    model: Component,
    loss: Component | None,
    data: DataConfig,
    seed: int,
    counts_correct: bool = False,
    eval_batch_size: int | None = None,
) -> Components:
    """Take what is given, build the rest from the configuration.

    A given training set without a held-out set means that there is none.

    Args:
        given: What the caller brings.
        model: Section ``model`` of the configuration.
        loss: Section ``loss``.
        data: Section ``data``.
        seed: Seed of the run.
        counts_correct: Whether training logs its accuracy.
        eval_batch_size: Key ``eval.batch_size``.

    Raises:
        ConfigError: Something is of the wrong kind.
        DataError: A data set cannot be opened, or is empty.
    """
    train_set, eval_sets, test_sets = gather_data(
        data, train_set=given.train_set, eval_set=given.eval_set, test_set=given.test_set
    )
    files = OpenFiles(train_set, *eval_sets.values(), *test_sets.values())
    built = ready_model(model, seed, given.model)
    loss_function = ready_loss(loss, given.loss)
    check_loss_parameters(loss_modules(loss_function, built))
    reading = build_reading(data, seed, eval_batch_size=eval_batch_size)
    if not is_materialized(built):
        batch = read_sample_batch(train_set, "data.train", reading)
        materialize_lazy(built, loss_function, batch, seed)
    return Components(
        model=built,
        loss=as_module(loss_function),  # of a function of torch, whose units are known
        loss_name=describe_loss(loss_function),
        train_set=train_set,
        eval_sets=eval_sets,
        test_sets=test_sets,
        reading=reading,
        files=files,
        counts_correct=counts_correct,
    )


def materialize_lazy(model: nn.Module, loss: LossFunction, batch: Batch, seed: int) -> None:
    """Give lazy modules their shapes, so that models can be compared and restored.

    Args:
        model: A model with lazy modules, on the host.
        loss: The loss.
        batch: Some samples.
        seed: Seed of the run, from which the weights follow.

    Raises:
        ConfigError: A lazy module is left out by a forward pass.
    """
    objective = Objective(loss, batch.targets, spread=spread_for(model, loss, batch))

    def call(model: nn.Module, inputs: Any) -> Any:
        return objective.outputs(model, inputs, batch.targets)

    materialize(model, batch.inputs, call, seed_for("weights", seed))


def ready_model(component: Component, seed: int, model: nn.Module | None = None) -> nn.Module:
    """Take the model that is given, or build the one of the configuration.

    Args:
        component: Section ``model`` of the configuration.
        seed: Seed of the run.
        model: The one that is given; None builds the other.

    Raises:
        ConfigError: It is no module.
    """
    # The weights follow from the seed alone: not from what the data sets drew before.
    torch.manual_seed(seed_for("weights", seed))
    model = instantiate(component, "model") if model is None else model
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}; name a torch.nn.Module, or a function that "
            "returns one."
        )
    check_model(model)
    if not model.training:  # as pretrained models come; parts may stay frozen, the whole may not
        model.train()
    for module in model.modules():  # such as one that keeps its batch normalization frozen
        if type(module).train is not nn.Module.train:
            module.train(module.training)
    return model


def ready_loss(component: Component | None, loss: LossFunction | None = None) -> LossFunction:
    """Take the loss that is given, or build the one of the configuration.

    Args:
        component: Key ``loss`` of the configuration; None: the output of the model is the loss.
        loss: The one that is given; None builds the other.

    Raises:
        ConfigError: It cannot be called, or is a class, whose call would make a loss.
    """
    if loss is None:
        loss = ModelLoss() if component is None else instantiate(component, "loss")
    if not callable(loss) or isinstance(loss, type):
        raise ConfigError(
            f"loss is a {type(loss).__name__}; name a module or function of (outputs, targets)."
        )
    return loss
