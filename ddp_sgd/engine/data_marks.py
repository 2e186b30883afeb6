"""Fingerprint of the training data in a checkpoint: a resume with other samples is refused.

Data of the same length may be others behind a path that moved, behind the same path, or given in
Python.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.reading import read_tensors
from ddp_sgd.distributed.collectives import from_rank_0
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fingerprint import Mark
from ddp_sgd.engine.resume import ResumePoint
from ddp_sgd.engine.state import State
from ddp_sgd.engine.train_state import Tree
from ddp_sgd.errors import RefusedError

Marks = Mapping[str, Mark]

KEY = "data"
"""Where the marks are in a checkpoint; those of earlier releases have none."""

_OF_TRAINING_DATA = " of data.train["
_SHOWN = 3


def with_marks(
    marks: Marks, capture: Callable[[State], tuple[Header, Tree]]
) -> Callable[[State], tuple[Header, Tree]]:
    """Add the marks of the training data to whatever a capture of the state gives.

    Args:
        marks: From ``require_consistency``; those of held-out data, which may change, are left out.
        capture: Gives header and content of a checkpoint.
    """
    packed = {name: tuple(mark) for name, mark in marks.items() if _OF_TRAINING_DATA in name}

    def capture_with_marks(state: State) -> tuple[Header, Tree]:
        header, tree = capture(state)
        return header, {**tree, KEY: packed} if packed else tree

    return capture_with_marks


def refuse_other_data(
    resume_point: ResumePoint,
    saved: Mapping[str, Any],
    marks: Marks,
    read_again: Callable[[], Marks],
) -> None:
    """Refuse to go on with other training data than those of the checkpoint.

    A difference counts if today's samples read alike twice: what a data set gives differently at
    each reading is no other data. A run that begins with the checkpoint of another one, by
    ``resume=PATH``, may have data of its own.

    Args:
        resume_point: What the run goes on from.
        saved: Content of the checkpoint.
        marks: Today's.
        read_again: Marks the same samples a second time; called where there is a difference.

    Raises:
        RefusedError: A sample is another one; the message names it.
    """
    if resume_point.header is None or resume_point.header.run_id != resume_point.run_id:
        return
    before = {name: Mark(*values) for name, values in (saved.get(KEY) or {}).items()}
    suspects = [
        name for name, mark in before.items() if name in marks and not mark.agrees_with(marks[name])
    ]
    second = read_again() if suspects else {}
    differences = [
        f"{name} was {before[name].text}, is {marks[name].text}"
        for name in suspects
        if name in second and second[name].agrees_with(marks[name])
    ]
    if differences:
        shown = ", ".join(differences[:_SHOWN]) + (", ..." if len(differences) > _SHOWN else "")
        raise RefusedError(
            f"data.train is not what the checkpoint of step {resume_point.header.step} was trained "
            f"on: {shown}; restore the data, choose another name, or set resume=never to "
            "begin at step 0."
        )


def refuse_data_of_another_run(
    resume_point: ResumePoint, read: Callable[[], Marks], runtime: Runtime
) -> None:
    """Refuse to give the result of a finished run for other data; equal on all ranks.

    Args:
        resume_point: What is left of the run; without a checkpoint nothing is compared.
        read: Marks the samples of today's data.
        runtime: This process.

    Raises:
        DataError: The checkpoint cannot be read.
        RefusedError: A sample is another one; the message names it.
    """
    saved = from_rank_0(
        read_tensors(resume_point.file).get(KEY) if resume_point.file else None, runtime
    )
    if saved:
        refuse_other_data(resume_point, {KEY: saved}, read(), read)
