"""The run folder: made new for every run, never overwritten."""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddp_sgd.errors import OutputError, RefusedError
from ddp_sgd.report.sink import Row, RunRecord


def open_run_folder(output_dir: str, name: str) -> Path:
    """Make the folder of a run; one that exists is moved aside to NAME.1, NAME.2, ...

    Args:
        output_dir: Folder that holds run folders; made if missing.
        name: Name of the run.

    Returns:
        The new, empty folder.

    Raises:
        OutputError: It cannot be made.
        RefusedError: A run that is going on writes into the folder of this name.
    """
    folder = Path(output_dir) / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() or folder.is_symlink():
            if _is_in_use(folder):
                raise RefusedError(
                    f"{folder} is in use by a run that is going on; wait for its end, or choose "
                    "another name."
                )
            folder.rename(_free_name(folder))
        folder.mkdir()
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def unwritable(path: Path, error: OSError) -> OutputError:
    """Say that a path cannot be written, and why."""
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}; set output_dir to a folder that you "
        "may write, with room on its disk."
    )


class RunFolder:
    """Writes config.yaml and plan.json at the start, result.json at the end.

    From its making to its end it holds a lock on the folder, which the system takes back if the
    process dies, so that no other run moves the folder away.

    Args:
        folder: The run folder, which exists.
        config_text: Resolved configuration as YAML.
    """

    def __init__(self, folder: Path, config_text: str) -> None:
        self._folder = folder
        self._config_text = config_text
        self._lock = _lock(folder)

    def start(self, record: RunRecord) -> None:
        """Write what was asked for and what follows from it."""
        self._write("config.yaml", self._config_text)
        self._write("plan.json", json.dumps(asdict(record.plan), indent=2) + "\n")

    def write(self, event: str, row: Row) -> None:
        """Do nothing: rows are the journal's."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write how the run ended, and give the folder free."""
        try:
            self._write("result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def _write(self, name: str, text: str) -> None:
        """Replace a file whole, so that a reader never sees half of it."""
        path = self._folder / name
        try:
            new = path.with_name(f".{name}.new")
            new.write_text(text)
            new.replace(path)
        except OSError as error:
            raise unwritable(path, error) from error


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside


def _lock(folder: Path) -> int | None:
    """Lock a folder for this process; None where it is taken, or the file system has no locks."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_in_use(folder: Path) -> bool:
    """Whether another run holds the lock on a folder."""
    if not folder.is_dir():
        return False
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False
