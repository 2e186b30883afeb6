"""Resume: rank 0 finds the checkpoint to go on from, and broadcasts the choice.

The plan of a run that is resumed, and the requirement that its training data are the same: data of
the same length may be others behind a path that moved, behind the same path, or given in Python.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors
from ddp_sgd.checkpointing.store import FOLDER_NAME, CheckpointFolder, Choice, Header
from ddp_sgd.config import RunConfig, changes_that_matter, rank_batch
from ddp_sgd.config.sources import rounding_notes, shortened
from ddp_sgd.config.yaml_io import read_yaml
from ddp_sgd.distributed.collectives import from_rank_0
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.rank_consistency import Mark, Marks
from ddp_sgd.engine.result import RunResult, read_result
from ddp_sgd.engine.train_state import State
from ddp_sgd.engine.triggers import read_deadline
from ddp_sgd.errors import ConfigError, DataError, RefusedError, unwritable
from ddp_sgd.files import is_missing, replace_file, retry, sync_file, sync_folder, unreadable
from ddp_sgd.plan import OrderFacts, Plan, make_plan
from ddp_sgd.report.journal import Origin, first_row, has_journal
from ddp_sgd.report.run_folder import RunFolder, refuse_endless_failure

_ADOPTING = ".adopting#"
"""Ending of the folder in which a checkpoint of another run is copied; no run has such a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """What was before; equal on all ranks, but for the file.

    Args:
        run_id: Identity of the run.
        has_rows: Whether the journal of an earlier attempt is there.
        header: Where the run stood when it was saved; None begins at step 0.
        file: The checkpoint, on the rank that has the folder.
        passed_over: What is wrong with newer checkpoints.
        ending: How the run ended, if there is nothing left to do.
        deadline: When the run must be over, unix time in seconds; None if not known.
        notes: What has changed since, and the user should know, one line each.
    """

    run_id: str
    has_rows: bool = False
    header: Header | None = None
    file: Path | None = None
    passed_over: tuple[str, ...] = ()
    ending: RunResult | None = None
    deadline: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def origin(self) -> Origin:
        """Where the journal begins."""
        head = self.header
        return Origin(
            run_id=self.run_id,
            has_rows=self.has_rows,
            is_resumed=self.has_rows or head is not None,
            step=head.step if head else 0,
            epoch=head.epochs if head else 0.0,
            samples=head.samples if head else 0,
            is_scored=head is not None and head.scored_at == head.step,
            note={
                "file": self.file.name if self.file else None,
                "passed_over": "; ".join(self.passed_over) or None,
            },
        )


def find_resume_point(config: RunConfig, folder: RunFolder | None, runtime: Runtime) -> ResumePoint:
    """Find out what there is to go on from; only rank 0 reads the folder.

    Args:
        config: Description of the run.
        folder: The run folder, on rank 0.
        runtime: This process.

    Raises:
        DataError: There has to be a checkpoint, and there is none that is whole.
        RefusedError: The folder holds a run of another configuration.
        RepeatedFailureError: The run failed again and again at the same step.
    """
    resume_point = _look_into(config, folder) if folder else None
    if resume_point is not None:
        resume_point = replace(
            resume_point, deadline=read_deadline(config.runtime.deadline, os.environ)
        )
    resume_point = from_rank_0(resume_point, runtime)
    return resume_point if folder else replace(resume_point, file=None)


def _look_into(config: RunConfig, folder: RunFolder) -> ResumePoint:
    refuse_endless_failure(folder.path, os.environ)
    adopted = config.resume not in ("auto", "never", "must") and _adopt(config, folder)
    saved = CheckpointFolder(folder.path / FOLDER_NAME)
    saved.clean_up()
    chosen = saved.choose()
    before = _config_in(folder.path)
    if chosen.manifest is None:
        return _without_checkpoint(config, folder, before, chosen)
    header = chosen.manifest.header
    before = before or (None if adopted else header.config)
    changes = changes_that_matter(before, config) if before else []
    if before:
        changes += shortened(before, config, header.plan["steps_per_epoch"])
    if changes:
        raise RefusedError(
            f"{folder.path} holds a run of another configuration: {', '.join(changes)}; restore "
            "that, choose another name, or set resume=never to begin again."
        )
    saved.set_aside(after_samples=header.samples)
    return ResumePoint(
        **_identity(folder.path, header),
        header=header,
        file=saved.path / chosen.manifest.file,
        passed_over=chosen.passed_over,
        ending=_ending(config, folder.path, before, saved_at=header.step),
        notes=tuple(rounding_notes(header.config, config)),
    )


def _without_checkpoint(
    config: RunConfig, folder: RunFolder, before: dict[str, Any] | None, chosen: Choice
) -> ResumePoint:
    """Begin at step 0: in the folder of the same run, or else in a new one."""
    why = "".join(f"; {line}" for line in chosen.passed_over)
    if config.resume not in ("auto", "never"):
        raise DataError(
            f"{folder.path} holds no checkpoint that is whole{why}; set resume=auto to begin again."
        )
    if before and not changes_that_matter(before, config):
        CheckpointFolder(folder.path / FOLDER_NAME).set_aside(after_samples=-1)
        return ResumePoint(
            **_identity(folder.path),
            passed_over=chosen.passed_over,
            ending=_ending(config, folder.path, before),
        )
    folder.renew()
    return ResumePoint(run_id=token_hex(4))


def _adopt(config: RunConfig, folder: RunFolder) -> bool:
    """Begin a run with a copy of a checkpoint, unless this very command has done so before."""
    before = _config_in(folder.path)
    if before and before.get("resume") == config.resume:
        return False
    file, named = find_checkpoint(Path(config.resume))
    staging = folder.path.with_name(f".{folder.path.name}{_ADOPTING}")
    copies = CheckpointFolder(staging)
    manifest = replace(named, file=copies.name_for(named.header))
    shutil.rmtree(staging, ignore_errors=True)  # of a start that was killed; the lock is ours
    try:
        staging.mkdir()
        copy = retry(lambda: shutil.copyfile(file, staging / manifest.file))
        sync_file(copy)
        replace_file(copy.with_suffix(".json"), manifest.to_text())
        if fault := copies.fault_of(manifest):
            raise DataError(f"the copy of {file} {fault}; look at the disk of {staging.parent}.")
        folder.renew()
        staging.rename(folder.path / FOLDER_NAME)
        sync_folder(folder.path)
    except OSError as error:
        raise unwritable(staging, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _identity(folder: Path, header: Header | None = None) -> dict[str, Any]:
    """Keep the identity of the journal; a branch of another run has none yet."""
    row = first_row(folder)
    known = row.get("run_id") or (header.run_id if header and has_journal(folder) else None)
    return {"run_id": known or token_hex(4), "has_rows": has_journal(folder)}


def _ending(
    config: RunConfig, folder: Path, before: dict[str, Any] | None, saved_at: int | None = None
) -> RunResult | None:
    """Give the result of a run that has trained to its end, unless its weights were lost."""
    result = read_result(folder)
    if result is None or result.status != "finished" or saved_at not in (None, result.step):
        return None
    lengths = (config.epochs, config.steps)
    return result if before and (before.get("epochs"), before.get("steps")) == lengths else None


def _config_in(folder: Path) -> dict[str, Any] | None:
    """Read the configuration of an earlier attempt; None if there was none.

    Raises:
        DataError: It cannot be read. Without it a run that goes on looks like a new one.
    """
    path = folder / "config.yaml"
    try:
        config = read_yaml(retry(path.read_bytes).decode(), str(path))
    except (ConfigError, UnicodeDecodeError):
        return None
    except OSError as error:
        if is_missing(error):
            return None
        otherwise = "set resume=never to begin in a new folder"
        raise unreadable(path, error, otherwise) from error
    return config if isinstance(config, dict) else None


MARKS = "data"
"""Where the marks of training data are in a checkpoint; those of earlier releases have none."""

_SHOWN = 3
"""Largest number of differences in one message."""


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
    before = {name: Mark(*values) for name, values in (saved.get(MARKS) or {}).items()}
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
        read_tensors(resume_point.file).get(MARKS) if resume_point.file else None, runtime
    )
    if saved:
        refuse_other_data(resume_point, {MARKS: saved}, read(), read)


def plan_from(
    config: RunConfig,
    header: Header | None,
    *,
    samples: int,
    world_size: int,
    facts_of_order: Callable[[int], OrderFacts] | None = None,
) -> Plan:
    """Work out the plan of a run that goes on.

    Args:
        config: Description of the run.
        header: Where it stood; None begins at step 0.
        samples: Length of the training set, n.
        world_size: Ranks of today.
        facts_of_order: What ``data.order`` reads, for a global batch; None: each sample once.

    Raises:
        RefusedError: The number of ranks changed and must not.
    """
    plan_for = partial(
        make_plan, config, samples=samples, world_size=world_size, facts_of_order=facts_of_order
    )
    if header is None:
        return plan_for()
    resized = header.world_size != world_size
    if resized and config.on_resize == "refuse":
        raise RefusedError(
            f"on_resize is refuse, and the run was saved on {header.world_size} ranks while there "
            f"are {world_size}; start {header.world_size} ranks, or set "
            "on_resize=keep_global_batch."
        )
    new_batch = rank_batch(header.config) != rank_batch(config.model_dump())
    if new_batch or (resized and config.on_resize == "rescale"):
        kept = None
    else:
        same = header.config["optim"]["reference_batch"] == config.optim.reference_batch
        reference = header.plan["reference_batch"] if same else config.optim.reference_batch
        kept = header.plan["global_batch"], reference or rank_batch(config.model_dump())
    plan = plan_for(kept=kept)
    step, skip = plan.step_at(header.epoch, header.position)
    return replace(plan, samples_before=header.samples - skip - plan.samples_at(step))


def state_from(header: Header | None, plan: Plan) -> tuple[State, int]:
    """Find the place in the plan; gives the state, and the samples of its step that were trained.

    In the middle of a step there is nothing to score: the evaluation before it was done.
    """
    if header is None:
        return State(), 0
    step, skip = plan.step_at(header.epoch, header.position)
    done = skip > 0 or header.scored_at == header.step
    return (
        State(
            step=step,
            scores=dict(header.scores),
            scored_at=step if done else -1,
            skipped=header.skipped,
        ),
        skip,
    )
