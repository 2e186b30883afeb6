"""Files by which a launcher follows its run: logs of its workers, and what they write. No torch.

Every file is compared with its state at the start of the launch, since a run folder has files of
earlier launches. Only times of files are compared with each other: the clock of their disk may
differ from that of this machine.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ddp_sgd.errors import DataError, ExitCode, OutputError, UserError
from ddp_sgd.host import scaled

_LOCK_S = 5.0
"""Longest wait for a worker that is being ended to leave the run folder, in seconds."""

_STOPPED_LINE = "the run was stopped while it was starting again; start it again to go on."


class RunFiles:
    """The log folder of a launch, and the files of its run folder.

    The run folder is made by rank 0, so the logs begin beside it, and move in when the run is over.

    Attributes:
        folder: The run folder.
        logs: Folder of the logs: first ``NAME.logs.*`` beside the run folder.
        entered: Made by torchrun once it is imported.
        exit_code: Where a rank leaves its exit code.
        torchrun_error: Where torchrun leaves its own error.

    Raises:
        OutputError: The folder of the logs cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.logs = Path(mkdtemp(dir=folder.parent, prefix=f"{folder.name}.logs."))
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written; set output_dir to a folder that you may write."
            ) from error
        self._result = folder / "result.json"
        self._failures = folder / "failures.jsonl"
        self._journal = folder / "metrics.jsonl"
        self._stop_result: dict[str, Any] | None = None
        self._before = {self._journal: _version(self._journal)}
        self._starts = 0
        self.begin_attempt()
        self.forget_results()

    def forget_results(self) -> None:
        """Take what the run folder holds by now for that of an earlier attempt."""
        for path in (self._result, self._failures):
            self._before[path] = _version(path)

    def begin_attempt(self) -> None:
        """Name the files of the next start of torchrun.

        Workers of the start before may still be about to leave an exit code, if it was killed.
        """
        self._starts += 1
        self.entered = self.logs / f"entered.{self._starts}"
        self.exit_code = self.logs / f"exit_code.{self._starts}"
        self.torchrun_error = self.logs / f"torchrun.{self._starts}.json"

    def attempts(self) -> list[Path]:
        """Folders that torchrun has made for attempts of its workers."""
        return list(self.logs.glob("*/attempt_*"))

    def left_code(self) -> int | None:
        """Read the exit code that a rank left for its launcher; None if none did."""
        text = _read(self.exit_code).strip()
        return int(text) if text.isdigit() else None

    def result(self) -> dict[str, Any] | None:
        """Read result.json, if it was written since the start; keep it if the run was stopped."""
        if not self._is_new(self._result):
            return None
        with suppress(ValueError):
            result = json.loads(_read(self._result))
            if isinstance(result, dict):
                if result.get("exit_code") == ExitCode.STOPPED:
                    self._stop_result = result
                return result
        return None

    def is_result_outdated(self) -> bool:
        """Whether workers were started after result.json was written."""
        return self._has_restarted_after(self._result)

    def has_stopped_and_restarted(self) -> bool:
        """Whether workers ended on request, and torchrun started them again."""
        result = self.result() or {}
        if result.get("exit_code") == ExitCode.STOPPED and self.is_result_outdated():
            return True
        # The next attempt removes result.json, but not this: a launcher that had to wait for a CPU
        # may have missed the former.
        return self.left_code() == ExitCode.STOPPED and self._has_restarted_after(self.exit_code)

    def has_given_up_and_restarted(self) -> bool:
        """Whether the run failed too often at one step, and torchrun started it again."""
        path = self._failures
        gives_up = self._is_new(path) and '"gives_up": true' in _read(path)
        return gives_up and self._has_restarted_after(path)

    def has_failed_without_restart(self) -> bool:
        """Whether a rank has left a failure, and no workers were started after it."""
        has_failed = self.left_code() not in (None, ExitCode.DONE)
        return has_failed and not self._has_restarted_after(self.exit_code)

    def has_reported(self) -> bool:
        """Whether a rank has printed an error."""
        return any("ddp_sgd: error: " in _read(path) for path in self.logs.glob("**/stderr.log"))

    def read_torchrun_error(self) -> str:
        """Read torchrun's own error; empty if there is none."""
        return _read(self.torchrun_error)

    def restore_stop_result(self) -> bool:
        """Write result.json for a run that was stopped while torchrun was starting it again.

        The workers of the attempt before have ended, those of the next one may not have come so far
        as to write it, but may have removed the last one.

        Returns:
            Whether it was written: the run began, and no other run has its folder.
        """
        from ddp_sgd.console import report_error
        from ddp_sgd.report.folder_lock import FolderLock
        from ddp_sgd.report.run_folder import write_result

        result = self._find_stop_result() if self._is_new(self._journal) else None
        if result is None:
            return False
        try:
            lock = FolderLock(self.folder, patience_s=scaled(_LOCK_S))
        except (OSError, UserError):
            return False
        try:
            write_result(self._result, result)
        except UserError as error:
            report_error(error)
            return False
        finally:
            lock.release()
        return True

    def _find_stop_result(self) -> dict[str, Any] | None:
        """Find where the run goes on: at its newest checkpoint, whose result may have been seen."""
        from ddp_sgd.checkpointing.store import FOLDER_NAME, CheckpointFolder
        from ddp_sgd.report.journal import read_journal
        from ddp_sgd.report.run_folder import BEGINNINGS, result_from_rows

        try:
            rows = read_journal(self._journal)
            manifests = CheckpointFolder(self.folder / FOLDER_NAME).manifests()
        except DataError:
            return None
        if not any(row["event"] in BEGINNINGS for row in rows):
            return None
        header = manifests[-1].header if manifests else None
        seen = self._stop_result
        if seen and (header is None or seen["samples"] == header.samples):
            return seen
        result = result_from_rows(rows, exit_code=ExitCode.STOPPED, error=_STOPPED_LINE)
        if header is None:
            return {**result, "step": 0, "epoch": 0.0, "samples": 0}
        place = {"step": header.step, "epoch": header.epochs, "samples": header.samples}
        return {**result, **place}

    def move_into_run_folder(self) -> None:
        """Move the logs of all workers into ``logs/`` of the run folder; or leave them there."""
        home = self.folder / "logs"
        with suppress(OSError):  # the run keeps its exit code, and the logs are named to the user
            home.mkdir(parents=True, exist_ok=True)
            for path in self.logs.iterdir():
                if path.is_dir():
                    shutil.move(path, home / path.name)
            self.remove()
            self.logs = home

    def remove(self) -> None:
        """Remove the folder of the logs."""
        shutil.rmtree(self.logs, ignore_errors=True)

    def _is_new(self, path: Path) -> bool:
        """Whether a file was written since the start."""
        now = _version(path)
        return now is not None and now != self._before[path]

    def _has_restarted_after(self, path: Path) -> bool:
        """Whether workers were started after a file was written."""
        written = _version(path)
        starts = filter(None, map(_version, self.attempts()))
        return written is not None and any(start[0] > written[0] for start in starts)


def _version(path: Path) -> tuple[int, int, int] | None:
    """Identify the content of a file: time in ns, inode, size; None if it is missing."""
    with suppress(OSError):
        stat = path.stat()
        return stat.st_mtime_ns, stat.st_ino, stat.st_size
    return None


def _read(path: Path) -> str:
    """Read a file; empty if it cannot be read."""
    with suppress(OSError):
        return path.read_text("utf-8", errors="replace")
    return ""
