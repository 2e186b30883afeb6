"""Run folder: config.yaml, plan.json, result.json and failures.jsonl, locked for one run at a time.

Nothing in it is overwritten. No torch.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_sgd.config import RunConfig, dump_yaml
from ddp_sgd.errors import ExitCode, RefusedError, RepeatedFailureError, unwritable
from ddp_sgd.files import make_folder, replace_file
from ddp_sgd.plan import Plan
from ddp_sgd.report.folder_lock import LOCK_NAME, OWNER_NAME, FolderLock

if TYPE_CHECKING:
    from ddp_sgd.distributed.runtime import Runtime

FILE_NAME = "failures.jsonl"
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "LAUNCH_RESTART_COUNT")

SAME_STEP = 3
"""Failures in a row at one step after which a run is not started again by its launcher."""

BEGINNINGS = ("start", "resume")
"""Events that an attempt writes into the journal when it begins."""

_WRITTEN_INTO = ("checkpoints", "logs", "wandb", "tensorboard")
"""Folders of a run folder in which files are made."""


class RunFolder:
    """Writes config.yaml and plan.json at the start, result.json at the end.

    From its making to its end it holds a lock on the folder, which the system takes back if the
    process dies, so that no other run writes into it or moves it away.

    Attributes:
        path: The folder.

    Raises:
        OutputError: It cannot be made.
        RefusedError: Another run is writing into it, or links in it lead out of it.
    """

    def __init__(self, config: RunConfig) -> None:
        self.path = Path(config.output_dir) / config.name
        self._config_text = dump_yaml(config)
        self._lock: FolderLock | None = None
        # A forked loader process would hold the lock for as long as it outlives a killed rank.
        os.register_at_fork(after_in_child=self.release)
        with translate_os_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._enter(config)
            except BaseException:
                self.release()
                raise

    def _enter(self, config: RunConfig) -> None:
        """Lock what is there, and make what is not."""
        while self._lock is None:
            if _is_real_folder(self.path):
                self._lock = _lock_if_there(self.path)
            if config.resume != "never":
                _refuse_links(self.path)
            if config.resume == "never" or not self.path.is_dir():
                self.renew()

    def renew(self) -> None:
        """Move what is there aside, to NAME.1, NAME.2, ..., and begin with an empty folder."""
        with translate_os_errors(self.path):
            while self._lock is None or not _is_empty(self.path):
                before = self._lock
                # Another start may have made the folder just now: that one is not ours to move.
                if os.path.lexists(self.path) and (before or not _is_real_folder(self.path)):
                    aside = _free_name(self.path)
                    with suppress(FileNotFoundError):  # another start has moved it already
                        self.path.rename(aside)
                    if before:
                        before.follow(aside)
                make_folder(self.path)
                self._lock = _lock_if_there(self.path)
                if before:
                    before.release()

    def begin(self, plan: Plan) -> None:
        """Write config.yaml and plan.json; an earlier result.json does not count any more.

        Raises:
            OutputError: They cannot be written.
        """
        _write(self.path / "config.yaml", self._config_text)
        _write(self.path / "plan.json", json.dumps(asdict(plan), indent=2) + "\n")
        with translate_os_errors(self.path / "result.json"):
            (self.path / "result.json").unlink(missing_ok=True)

    def check(self) -> None:
        """Raise if the folder is no longer this run's.

        Raises:
            RefusedError: Another run took it over.
        """
        if self._lock is not None:
            self._lock.check()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write how the run ended, and release the folder.

        Raises:
            OutputError: It cannot be written.
            RefusedError: Another run took the folder over; nothing is written then.
        """
        try:
            self.check()
            write_result(self.path / "result.json", result)
            if result.get("status") == "failed":
                with translate_os_errors(self.path):
                    note_failure(self.path, result["step"], result["exit_code"], result["error"])
        finally:
            self.release()

    def release(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None


@contextmanager
def claim_run_folder(config: RunConfig, runtime: "Runtime") -> Iterator[RunFolder | None]:
    """Make or enter the run folder, on rank 0; the others have none.

    Raises:
        OutputError: It cannot be made.
        RefusedError: It is in use, or links in it lead out of it.
    """
    if runtime.rank != 0:
        yield None
        return
    folder = RunFolder(config)
    try:
        yield folder
    finally:
        folder.release()


@contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Raise an OSError as an OutputError that names the path that cannot be written."""
    try:
        yield
    except OSError as error:
        raise unwritable(path, error) from error


def _write(path: Path, text: str) -> None:
    with translate_os_errors(path):
        replace_file(path, text)


def _refuse_links(folder: Path) -> None:
    """Refuse to write where a link leads out of the folder."""
    inside = [folder]
    for place in (folder, *(folder / name for name in _WRITTEN_INTO)):
        with suppress(FileNotFoundError, NotADirectoryError):
            inside += sorted(place.iterdir())
    home = folder.parent.resolve() / folder.name
    for path in inside:
        if path.is_symlink() and not path.resolve().is_relative_to(home):
            raise RefusedError(
                f"{path} is a link that leads out of the run folder, to {path.resolve()}; remove "
                "it, choose another name, or set resume=never to begin with a new folder."
            )


def _free_name(folder: Path) -> Path:
    number = 1
    while os.path.lexists(aside := folder.with_name(f"{folder.name}.{number}")):
        number += 1
    return aside


def _lock_if_there(folder: Path) -> FolderLock | None:
    """Lock a folder; None if another start has moved it aside meanwhile."""
    try:
        return FolderLock(folder)
    except FileNotFoundError:
        return None


def _is_real_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_empty(folder: Path) -> bool:
    """Whether nothing is in a folder but what keeps other runs out of it."""
    return {path.name for path in folder.iterdir()} <= {LOCK_NAME, OWNER_NAME}


def note_failure(folder: Path, step: int, code: int, error: str) -> None:
    """Append a failure; one of the world around is not noted.

    The row has ``gives_up`` if it is the last that is allowed, so that the launcher can end
    torchrun, which would start all processes again only to read so.

    Raises:
        OSError: It cannot be written.
    """
    if code != ExitCode.PEER:
        path = folder / FILE_NAME
        row = {"time": time.time(), "step": step, "exit_code": code, "error": error}
        if _are_endless([*_rows(path), row]):
            row["gives_up"] = True
        with path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")


def refuse_endless_failure(folder: Path, environ: Mapping[str, str]) -> None:
    """End a run that its launcher restarts again and again to fail at the same step.

    A run that is started afresh, by a person, gets all its chances again.

    Raises:
        RepeatedFailureError: It failed ``SAME_STEP`` times in a row at one step.
    """
    path = folder / FILE_NAME
    restarts = (environ.get(name, "0") for name in _RESTARTS)
    if not any(count.isdigit() and int(count) > 0 for count in restarts):
        path.unlink(missing_ok=True)
        return
    rows = _rows(path)
    if _are_endless(rows):
        row = rows[-1]
        raise RepeatedFailureError(
            f"the run failed {SAME_STEP} times in a row at step {row['step']} and is not started "
            f"again; fix what ended it: {row['error']}",
            row["exit_code"],
        )


def _are_endless(rows: Sequence[Mapping[str, Any]]) -> bool:
    last = rows[-SAME_STEP:]
    return len(last) == SAME_STEP and len({row["step"] for row in last}) == 1


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []


def result_from_rows(
    rows: Sequence[Mapping[str, Any]], *, exit_code: ExitCode, error: str
) -> dict[str, Any]:
    """Build a result from the journal: it stands where the last row does.

    Args:
        rows: The journal; at least one row records the start of the run.
        exit_code: How the run ended; a run that was stopped on request has not failed.
        error: What the user should know.
    """
    begin = next(row for row in reversed(rows) if row["event"] in BEGINNINGS)
    return {
        "status": "stopped" if exit_code == ExitCode.STOPPED else "failed",
        "exit_code": int(exit_code),
        **{key: rows[-1][key] for key in ("step", "epoch", "samples")},
        "world_size": begin["world_size"],
        "error": error,
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write result.json, whole or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    _write(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
