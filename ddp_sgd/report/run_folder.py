"""The run folder: made new for every run, never overwritten."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddp_sgd.errors import OutputError
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
    """
    folder = Path(output_dir) / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() or folder.is_symlink():
            folder.rename(_free_name(folder))
        folder.mkdir()
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def unwritable(path: Path, error: OSError) -> OutputError:
    """Say that a path cannot be written, and why."""
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}; set output_dir to a folder that "
        "you may write, "
        "with room on its disk."
    )


class RunFolder:
    """Writes config.yaml and plan.json at the start, result.json at the end.

    Args:
        folder: The run folder, which exists.
        config_text: Resolved configuration as YAML.
    """

    def __init__(self, folder: Path, config_text: str) -> None:
        self._folder = folder
        self._config_text = config_text

    def start(self, record: RunRecord) -> None:
        """Write what was asked for and what follows from it."""
        self._write("config.yaml", self._config_text)
        self._write("plan.json", json.dumps(asdict(record.plan), indent=2) + "\n")

    def write(self, event: str, row: Row) -> None:
        """Do nothing: rows are the journal's."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write how the run ended."""
        self._write("result.json", json.dumps(result, indent=2, allow_nan=False) + "\n")

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
