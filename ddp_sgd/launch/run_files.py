"""Files by which a launch follows its run: the logs of its workers, and what they write. No torch.

Every file is compared with its state at the start of the launch, since a run folder has files of
earlier launches. Only times of files are compared with each other: the clock of their disk may
differ from that of this machine.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

from ddp_sgd.errors import ExitCode, OutputError
from ddp_sgd.report.run_folder import FILE_NAME as FAILURES


class _Version(NamedTuple):
    """Tells one content of a file from another without reading it."""

    inode: int
    time_ns: int
    size_bytes: int


class RunFiles:
    """The log folder of a launch, and the files of its run folder.

    The run folder is made by rank 0, so the logs begin beside it, and move in when the run is over.

    Args:
        folder: The run folder.

    Attributes:
        folder: The run folder.
        logs: Folder of the logs: first ``NAME.logs.*`` beside the run folder.
        stop_result: The last result of workers that ended on request, as it was seen.

    Raises:
        OutputError: The folder of the logs cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stop_result: dict[str, Any] | None = None
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            self.logs = Path(mkdtemp(dir=folder.parent, prefix=f"{folder.name}.logs."))
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written; set output_dir to a folder that you may write."
            ) from error
        self.entered = self.logs / "entered"
        self.exit_code = self.logs / "exit_code"
        self.torchrun_error = self.logs / "torchrun.json"
        self._result = folder / "result.json"
        self._journal_before = _version(folder / "metrics.jsonl")
        self._before: dict[Path, _Version | None] = {}
        self.forget_results()

    def forget_results(self) -> None:
        """Take what the run folder holds by now for that of an earlier attempt."""
        paths = (self._result, self.folder / FAILURES)
        self._before = {path: _version(path) for path in paths}

    def begin_attempt(self) -> None:
        """Remove what an earlier start of torchrun left in the folder of the logs."""
        for path in (self.entered, self.exit_code, self.torchrun_error):
            path.unlink(missing_ok=True)

    def attempts(self) -> list[Path]:
        """Folders that torchrun has made for attempts of its workers."""
        return list(self.logs.glob("*/attempt_*"))

    def read_torchrun_error(self) -> str:
        """Read torchrun's own error; empty if there is none."""
        with suppress(OSError):
            return self.torchrun_error.read_text(errors="replace")
        return ""

    def has_begun(self) -> bool:
        """Whether the run has written rows since the launch."""
        journal = _version(self.folder / "metrics.jsonl")
        return journal is not None and journal != self._journal_before

    def left_code(self) -> int | None:
        """Read the exit code that a rank left for its launcher; None if none did."""
        with suppress(OSError, ValueError):
            return int(self.exit_code.read_text())
        return None

    def result(self) -> dict[str, Any] | None:
        """Read result.json, if it was written since the start; keep it if the run was stopped."""
        result = _read(self._result) if self._is_new(self._result) else None
        if result and result.get("exit_code") == ExitCode.STOPPED:
            self.stop_result = result
        return result

    def is_result_outdated(self) -> bool:
        """Whether workers were started after result.json was written."""
        return self._has_restarted_after(self._result)

    def has_stopped_and_restarted(self) -> bool:
        """Whether workers ended on request, and torchrun started them again."""
        result = self.result()
        if result and result.get("exit_code") == ExitCode.STOPPED and self.is_result_outdated():
            return True
        # The next attempt removes result.json, but not this: a launcher that had to wait for a CPU
        # may have missed the former.
        return self.left_code() == ExitCode.STOPPED and self._has_restarted_after(self.exit_code)

    def has_given_up_and_restarted(self) -> bool:
        """Whether the run failed too often at one step, and torchrun started it again."""
        path = self.folder / FAILURES
        if not self._is_new(path) or not self._has_restarted_after(path):
            return False
        with suppress(OSError):
            return '"gives_up": true' in path.read_text()
        return False

    def has_failed_without_restart(self) -> bool:
        """Whether a rank has left a failure, and no workers were started after it."""
        has_failed = self.left_code() not in (None, ExitCode.DONE)
        return has_failed and not self._has_restarted_after(self.exit_code)

    def has_reported(self) -> bool:
        """Whether a rank has printed an error."""
        for path in self.logs.glob("**/stderr.log"):
            with suppress(OSError):
                if b"ddp_sgd: error: " in path.read_bytes():
                    return True
        return False

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
        if written is None:
            return False
        versions = map(_version, self.attempts())
        return any(version and version.time_ns > written.time_ns for version in versions)


def _version(path: Path) -> _Version | None:
    with suppress(OSError):
        stat = path.stat()
        return _Version(stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return None


def _read(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else None
    return None
