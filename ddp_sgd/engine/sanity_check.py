"""Sanity check: one batch through the model and the loss before the run, without a trace.

What does not fit is found and named before the first step, and what steps depend on is found out:
the units of the loss, the buffers that training changes, the random numbers that it draws.
"""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ddp_sgd.data.device import move
from ddp_sgd.distributed.collectives import gather_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.after_step import AfterStep, check_after_step
from ddp_sgd.engine.buffers import TrainingBuffers, buffer_at, statistics_of
from ddp_sgd.engine.components import Batch, spread_for
from ddp_sgd.engine.evaluation import evaluating
from ddp_sgd.engine.labels import check_labels, count_classes, listed_targets
from ddp_sgd.engine.loss_check import (
    find_form,
    judge_loss,
    name_of,
    refuse_accuracy,
    require_same_form,
)
from ddp_sgd.engine.model_check import (
    check_changed_parameters,
    check_embeddings,
    check_gradients,
    check_registered,
    how_to_fit,
    list_registered,
)
from ddp_sgd.engine.precision import Numerics
from ddp_sgd.engine.side_effects import (
    CollectiveWatch,
    Place,
    SideEffects,
    WriteWatch,
    undo_side_effects,
)
from ddp_sgd.engine.units import backward
from ddp_sgd.errors import ConfigError, Use, refuse_out_of_memory
from ddp_sgd.losses import LossFunction, ModelLoss, Objective, call_loss, loss_modules
from ddp_sgd.named_losses import LOSS, ONE_NUMBER, is_loss
from ddp_sgd.plan import Plan
from ddp_sgd.seeds import Randomness
from ddp_sgd.tree import describe, list_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFacts:
    """Result of a pass in training mode.

    Args:
        objective: The loss, as the sum over units that it is made of.
        buffers: The buffers that steps change.
        randomness: The generators that steps draw from.
        after_step: What calls the model after a step; None: nothing does.
        notes: What the user should know, one line each.
    """

    objective: Objective
    buffers: TrainingBuffers
    randomness: Randomness
    after_step: AfterStep | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFacts:
    """Result of a pass in evaluation mode.

    Args:
        objective: The loss, as the sum over units that it is made of.
        randomness: The generators that it draws from.
        buffers: The buffers that it changes, such as those of observers.
        communicates: Whether model or loss communicate with other ranks.
    """

    objective: Objective
    randomness: Randomness
    buffers: TrainingBuffers
    communicates: bool

    def begin_chunk(self, seed: int, chunk: int) -> None:
        """Seed what is drawn for a chunk, and put the buffers back that those before it changed.

        So no score depends on which chunks a rank has scored before.

        Args:
            seed: Seed of the run.
            chunk: Number of the chunk, from 0.
        """
        self.buffers.restore()
        self.randomness.seed_chunk(seed, chunk)


def check_training(  # noqa: PLR0913  # what a step is made of
    model: nn.Module,
    loss: LossFunction,
    dataset: Any,
    batch: Batch,
    plan: Plan,
    runtime: Runtime,
    numerics: Numerics | None = None,
    *,
    counts_correct: bool = False,
) -> TrainingFacts:
    """Take a batch forward and backward in training mode.

    Args:
        model: The model on the runtime's device, in the mode that it is trained in.
        loss: Module or function of (outputs, targets).
        dataset: The training set.
        batch: Some of its samples.
        plan: The run's arithmetic.
        runtime: This process.
        numerics: Precision and memory format of the passes; None: torch's defaults.
        counts_correct: Whether the accuracy is logged in training.

    Raises:
        DataError: Labels lie out of range.
        ConfigError: Model, loss and samples do not fit together, or cannot be trained exactly.
    """
    modules = loss_modules(loss, model)
    check_embeddings(model, plan)
    randomness = Randomness(runtime.device)
    whole = [model, *modules.values()]
    with undo_side_effects(whole, randomness.generators) as effects:
        randomness.seed(0)
        check = _Check(model, loss, dataset, batch, runtime, numerics)
        registered = list_registered(model)
        outputs, value = check.forward()
        check_registered(model, registered)
        check.backward(value)
        check_gradients(model)
        check_changed_parameters(model, effects.changed_parameters(), plan)
        _follow(randomness, effects)
        after_step = check_after_step(model, plan, runtime, randomness.generators)
        changed = effects.changed_buffers(_written_in_a_pass(check, whole))
        resized = effects.resized_buffers()
        read = _read_in_training(check, effects, randomness, changed, runtime)
        objective, notes = check.judge(outputs, counts_correct=counts_correct)
    roots = {"model": model, **{f"loss {name}": each for name, each in modules.items()}}
    kept = [*changed, *statistics_of(whole)]
    return TrainingFacts(
        objective=objective,
        buffers=TrainingBuffers(
            _on_any_rank(kept, roots, runtime),
            _on_any_rank(read, roots, runtime),
            runtime,
            _on_any_rank(resized, roots, runtime),
        ),
        randomness=randomness,
        after_step=after_step,
        notes=notes,
    )


def check_evaluation(
    model: nn.Module,
    loss: LossFunction,
    dataset: Any,
    batch: Batch,
    runtime: Runtime,
    numerics: Numerics | None = None,
    *,
    where: str = "data.eval",
) -> EvaluationFacts:
    """Send a batch through model and loss in evaluation mode.

    Args:
        model: The model on the runtime's device.
        loss: Module or function of (outputs, targets).
        dataset: The held-out set.
        batch: Some of its samples.
        runtime: This process.
        numerics: Precision and memory format of the passes; None: torch's defaults.
        where: Key of the held-out set, for errors.

    Raises:
        DataError: Labels lie out of range.
        ConfigError: Model, loss and samples do not fit together.
    """
    whole = [model, *loss_modules(loss, model).values()]
    randomness = Randomness(runtime.device)
    watch = nullcontext() if runtime.alone else CollectiveWatch()
    with undo_side_effects(whole, randomness.generators) as effects, evaluating(model):
        check = _Check(model, loss, dataset, batch, runtime, numerics, where)
        with watch:
            outputs, _ = check.forward()
        _follow(randomness, effects)
        changed = effects.changed_buffers(_written_in_a_pass(check, whole))
        objective, _ = check.judge(outputs)
    return EvaluationFacts(
        objective=objective,
        randomness=randomness,
        buffers=TrainingBuffers(changed, [], runtime),
        communicates=isinstance(watch, CollectiveWatch) and watch.seen,
    )


class _Check:
    """One batch on its way through model and loss; errors name what does not fit."""

    def __init__(
        self,
        model: nn.Module,
        loss: LossFunction,
        dataset: Any,
        batch: Batch,
        runtime: Runtime,
        numerics: Numerics | None,
        where: str = "data.train",
    ) -> None:
        self._model = model
        self._loss = loss
        self._where = where
        self._runtime = runtime
        self._device = device = runtime.device
        self._form = ONE_NUMBER
        self._listed = listed_targets(dataset, batch.targets, batch.indices)
        self._labels = batch.targets if self._listed is None else self._listed
        self._inputs, self._targets = move(batch.inputs, device), move(batch.targets, device)
        self._targets_of_one = move(batch.targets_of_one, device)
        self._spread = spread_for(model, loss, batch)
        self._numerics = numerics or Numerics()
        self._objective = self._numerics.objective(loss, batch.targets, spread=self._spread)
        named = "" if where == "data.eval" else f" from {where}"
        self._mode = " in training mode" if model.training else named
        self._use = Use.STEP if model.training else Use.EVALUATION

    def forward(self) -> tuple[Any, torch.Tensor]:
        """Call the model and the loss; gives what the first returns, and what is trained."""
        outputs = self.call_model()
        if self._objective.takes_classes:
            self._check_labels(outputs)
        returned = self._call_loss(outputs)
        if isinstance(self._loss, ModelLoss) and not self._model.training and not is_loss(returned):
            raise ConfigError(
                f"loss is null while the model gives {describe(returned)} in evaluation mode; set "
                "data.eval=null, or let the model give its loss in that mode, too."
            )
        self._form = find_form(self._loss, returned, self._targets, self._device)
        return outputs, self._form.values(returned)[LOSS]

    def call_model(self) -> Any:
        """Call the model alone."""
        try:
            return self._objective.outputs(self._model, self._inputs, self._targets)
        except Exception as error:  # any error of a user's model
            refuse_out_of_memory(error, self._use)
            raise ConfigError(
                f"model is {type(self._model).__name__}, which fails on inputs of "
                f"{describe(self._inputs)}{self._mode}, {type(error).__name__}: {error}; "
                f"{how_to_fit(self._inputs, self._where)}."
            ) from error

    def _call_loss(self, outputs: Any) -> Any:
        try:
            with warnings.catch_warnings(), self._numerics.autocast():
                # Shapes that torch stretches to fit give a loss over unintended pairs.
                warnings.filterwarnings("error", message="Using a target size")
                return call_loss(self._loss, outputs, self._targets)
        except Exception as error:  # any error of a user's loss
            refuse_out_of_memory(error, self._use)
            if isinstance(error, IndexError):
                self._check_labels(outputs)
            if self._targets is None:
                raise ConfigError(
                    f"loss is {name_of(self._loss)}, which fails without targets, "
                    f"{type(error).__name__}: {error}; choose them by data.target, or name a loss "
                    "of the outputs alone."
                ) from error
            raise ConfigError(
                f"the model gives {describe(outputs)}{self._mode}, which does not fit targets of "
                f"{describe(self._targets)}, {type(error).__name__}: {error}; change the last "
                "layer of the model, the loss or the targets."
            ) from error

    def backward(self, value: torch.Tensor) -> None:
        """Compute the gradients."""
        if not value.requires_grad:
            raise ConfigError(
                f"loss is {name_of(self._loss)}, whose value does not depend on a parameter that "
                "requires a gradient; look for detach(), no_grad() or argmax() in model and loss."
            )
        try:
            backward(value, torch.ones_like(value))
        except Exception as error:  # any error of a user's function
            refuse_out_of_memory(error, self._use)
            raise ConfigError(
                f"model is {type(self._model).__name__}, whose backward pass fails, "
                f"{type(error).__name__}: {error}; change what cannot be differentiated."
            ) from error

    def judge(
        self, outputs: Any, *, counts_correct: bool = False
    ) -> tuple[Objective, tuple[str, ...]]:
        """Find out the units of the loss, and whether targets are classes; gives notes, too."""
        takes_classes, notes = judge_loss(
            self._loss, self._form, outputs, self._targets, self._targets_of_one
        )
        if takes_classes:
            self._check_labels(outputs)
        objective = self._numerics.objective(
            self._loss,
            self._labels,
            complete=self._listed is not None,
            takes_classes=takes_classes,
            spread=self._spread,
            form=self._form,
            counts_correct=counts_correct,
        )
        if counts_correct:
            refuse_accuracy(self._loss, outputs, self._targets, takes_classes=takes_classes)
        require_same_form(self._form, self._runtime)
        return objective, notes

    def _check_labels(self, outputs: Any) -> None:
        if classes := count_classes(outputs, self._targets):
            counted = self._labels[self._labels != self._objective.ignore_index]
            check_labels(counted, classes, self._where)


def _written_in_a_pass(check: _Check, modules: list[nn.Module]) -> set[int]:
    """Find out what memory another pass writes to; compiled modules are not compiled in it."""
    watch = WriteWatch()
    if any(True for module in modules for _ in module.buffers()):
        with watch:
            check.forward()
    return watch.written


def _follow(randomness: Randomness, effects: SideEffects) -> None:
    """Let all be seeded that passes were seen to draw from."""
    randomness.follow(
        draws_from_random=effects.draws_from_random, draws_from_numpy=effects.draws_from_numpy
    )


def _read_in_training(
    check: _Check,
    effects: SideEffects,
    randomness: Randomness,
    changed: list[Place],
    runtime: Runtime,
) -> list[Place]:
    """List the changed buffers that a pass in training mode may read, if there are several ranks.

    Those are all but running statistics of normalization layers; and also these, where a pass
    gives other outputs once they are changed, as in layers that renormalize.
    """
    statistics = set(statistics_of(module for module, _ in changed))
    kept = [place for place in changed if place in statistics]
    others = [place for place in changed if place not in statistics]
    if runtime.alone or not kept:
        return others
    outputs = []
    for change in (0, 1):
        effects.undo()
        randomness.seed(0)
        with torch.no_grad():
            for place in kept:
                buffer_at(place).add_(change)
            outputs.append(check.call_model())
    return others if _are_equal(*outputs) else changed


def _on_any_rank(
    places: Iterable[Place], roots: Mapping[str, nn.Module], runtime: Runtime
) -> list[Place]:
    """Take what any rank has found, in one order: ranks may have begun with other weights.

    A place may have no buffer yet, since a forward pass makes it.
    """
    paths: dict[nn.Module, tuple[str, str]] = {}
    for where, root in roots.items():
        for path, module in root.named_modules():
            paths.setdefault(module, (where, path))
    modules = {path: module for module, path in paths.items()}
    mine = [(paths[module], name) for module, name in places if module in paths]
    found = [place for each in gather_over_ranks(mine, runtime) for place in each]
    return [(modules[path], name) for path, name in dict.fromkeys(found)]


def _are_equal(one: Any, other: Any) -> bool:
    first, second = list_tensors(one), list_tensors(other)
    return len(first) == len(second) and all(map(torch.equal, first, second))
