"""Checkpoints of a run: what the checkpointer saves, and where."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ddp_sgd.checkpointing.checkpointer import AsyncCheckpointer, Checkpointer, NoCheckpointer
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.store import FOLDER_NAME, CheckpointFolder
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.engine.resume import ResumePoint, with_marks
from ddp_sgd.engine.setup import TrainContext
from ddp_sgd.engine.train_state import (
    State,
    Tree,
    other_state_dict,
    refuse_foreign,
    run_state_dict,
)
from ddp_sgd.files import make_folder
from ddp_sgd.report.reporter import Reporter
from ddp_sgd.report.run_folder import RunFolder, unwritable


@contextmanager
def open_checkpointer(
    config: RunConfig,
    context: TrainContext,
    resume_point: ResumePoint,
    folder: RunFolder | None,
    report: Reporter,
) -> Iterator[Checkpointer[State]]:
    """Open the checkpointer, on the rank that has the run folder; the others save nothing.

    Args:
        config: Description of the run.
        context: The run, ready to start.
        resume_point: What the run goes on from.
        folder: The run folder, on rank 0.
        report: Takes a row about every save.

    Raises:
        ConfigError: The state holds objects that a resume could not load safely.
        OutputError: The folder of checkpoints cannot be made.
    """
    if folder is None:
        yield NoCheckpointer()
        return
    saved = CheckpointFolder(folder.path / FOLDER_NAME)
    try:
        make_folder(saved.path)
    except OSError as error:
        raise unwritable(saved.path, error) from error
    state_dict = with_marks(
        context.marks,
        partial(
            _whole_state_dict,
            context,
            optimizer=context.optimizer,
            plan=context.plan,
            config=config.model_dump(mode="json"),
            run_id=resume_point.run_id,
            loss=context.loss,
        ),
    )
    _, tensors = state_dict(State())
    refuse_foreign(tensors["model"])
    with AsyncCheckpointer(
        saved,
        state_dict,
        tensors,
        device=context.device,
        keep=config.checkpoint.keep,
        before=report.catch_up,  # a run that is killed has every row up to where it goes on
        report=lambda header, row: report.checkpoint(header.step, row),
    ) as checkpointer:
        yield checkpointer


def _whole_state_dict(context: TrainContext, state: State, **others: Any) -> tuple[Header, Tree]:
    """Gather all that a resume of this run needs."""
    header, tree = run_state_dict(state, model=context.wrapper.inner, **others)
    more = other_state_dict(context.wrapper.inner, context.loss_modules, context.buffers)
    return header, {**tree, **more}
