"""Resume: rank 0 finds the checkpoint to go on from, and broadcasts the choice."""

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.retrying import is_missing, retry, unreadable
from ddp_sgd.checkpointing.serialization import find_checkpoint
from ddp_sgd.checkpointing.store import FOLDER_NAME, CheckpointFolder, Choice
from ddp_sgd.config import RunConfig, changes_that_matter
from ddp_sgd.config.yaml_io import read_yaml
from ddp_sgd.distributed.collectives import from_rank_0
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.result import RunResult, read_result
from ddp_sgd.engine.triggers import read_deadline
from ddp_sgd.errors import ConfigError, DataError, RefusedError
from ddp_sgd.files import replace_file, sync_file, sync_folder
from ddp_sgd.report.journal import first_row, has_journal
from ddp_sgd.report.logger import Origin
from ddp_sgd.report.run_folder import RunFolder, refuse_endless_failure, unwritable

_ADOPTING = ".adopting#"
"""Ending of the folder in which a checkpoint of another run is copied; no run has such a name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """What was before; equal on all ranks, but for the file.

    Args:
        run_id: Identity of the run.
        has_rows: Whether the journal of an earlier life is there.
        header: Where the run stood when it was saved; None begins at step 0.
        file: The checkpoint, on the rank that has the folder.
        passed_over: What is wrong with newer checkpoints.
        ending: How the run ended, if there is nothing left to do.
        deadline: When the run must be over, unix time in seconds; None if nobody says.
    """

    run_id: str
    has_rows: bool = False
    header: Header | None = None
    file: Path | None = None
    passed_over: tuple[str, ...] = ()
    ending: RunResult | None = None
    deadline: float | None = None

    @property
    def origin(self) -> Origin:
        """Where the journal begins."""
        head = self.header
        return Origin(
            run_id=self.run_id,
            has_rows=self.has_rows,
            is_resumed=self.has_rows or head is not None,
            step=head.step if head else 0,
            epoch=head.epoch + head.position / head.plan["samples_per_epoch"] if head else 0.0,
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
    if before and (changes := changes_that_matter(before, config)):
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
    """Give the result of a run that has trained all its epochs, unless its weights were lost."""
    result = read_result(folder)
    if result is None or result.status != "finished" or saved_at not in (None, result.step):
        return None
    return result if before and before.get("epochs") == config.epochs else None


def _config_in(folder: Path) -> dict[str, Any] | None:
    """Read the configuration of an earlier life; None if there was none.

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
