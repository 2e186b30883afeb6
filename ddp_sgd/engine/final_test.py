"""Test set: scored once, at the end of a run, with the weights of its best checkpoint.

The run itself, its weights, buffers and random numbers, stays as it is.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddp_sgd.checkpointing.serialization import read_tensors
from ddp_sgd.checkpointing.store import FOLDER_NAME, CheckpointFolder, best_of
from ddp_sgd.distributed.collectives import from_rank_0
from ddp_sgd.distributed.progress import Phase
from ddp_sgd.engine.context import TrainContext, broadcast_buffers_of
from ddp_sgd.engine.evaluation import Metrics
from ddp_sgd.engine.side_effects import undo_side_effects
from ddp_sgd.engine.train_state import broadcast_state, other_entries, restore, restore_buffers
from ddp_sgd.errors import Use, memory_for
from ddp_sgd.scores import choosing_score

STEP = "test/step"
"""Step of the weights that were scored, in the row and in the result."""


class _Chosen(NamedTuple):
    """The weights to score.

    Args:
        step: Steps that they have taken.
        file: Their checkpoint; None: those that the run ends with.
        why: What chose them, in words.
    """

    step: int
    file: Path | None
    why: str


def score_test_set(
    context: TrainContext, folder: Path | None, notice: Callable[[str], None]
) -> Metrics:
    """Score the test set, if there is one, and the run has come to its end; all ranks call this.

    Args:
        context: The run, whose saves are all written.
        folder: The run folder, on the rank that has it.
        notice: Receives a line that names the weights.

    Returns:
        ``test/step``, then ``test/loss`` and so on as of an evaluation, equal on all ranks; empty
        if nothing is to be scored.

    Raises:
        DataError: The best checkpoint, or a sample, cannot be read.
    """
    score, runtime = context.score_test, context.runtime
    if score is None or context.state.step != context.plan.total_steps:
        return {}
    chosen = from_rank_0(_choose(context, folder) if folder else None, runtime)
    notice(f"data.test is scored with the weights of step {chosen.step}, {chosen.why}")
    context.progress.enter(Phase.EVALUATE, context.state.step)
    model = context.wrapper.inner
    modules = [model, *context.loss_modules.values()]
    extra = deepcopy(other_entries(model))  # which may hold more than attributes of modules
    with memory_for(Use.EVALUATION), undo_side_effects(modules, context.randomness.generators):
        if chosen.file is not None:
            _load(context, chosen.file if folder else None)
        scores = score(lambda: False)
    if extra:
        model.load_state_dict(extra, strict=False)
    return {STEP: chosen.step, **scores}


def _choose(context: TrainContext, folder: Path) -> _Chosen:
    """Choose the weights of the best checkpoint; the last ones, if none was scored, or is whole."""
    last = context.state.step
    saved = CheckpointFolder(folder / FOLDER_NAME)
    best = best_of(saved.manifests())
    if best is None:
        return _Chosen(last, None, "the last ones, since no held-out set chooses")
    if fault := saved.fault_of(best):
        return _Chosen(
            last, None, f"the last ones, since the best checkpoint, {best.file}, {fault}"
        )
    header = best.header
    is_last = header.samples == context.plan.samples_at(last)
    file = None if is_last else saved.path / best.file
    return _Chosen(header.step, file, f"the best by {choosing_score(header.scores)}")


def _load(context: TrainContext, file: Path | None) -> None:
    """Load weights and buffers of a checkpoint, on the rank that has it, and broadcast them."""
    model, runtime = context.wrapper.inner, context.runtime
    if file is not None:
        tensors: Mapping[str, Any] = read_tensors(file)
        restore(model, tensors)
        restore_buffers(model, context.loss_modules, context.buffers, tensors)
    with torch.no_grad():
        broadcast_state(model, runtime)
        broadcast_buffers_of(context.loss_modules, runtime)
