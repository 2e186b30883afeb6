"""Reads W&B runs back from disk by wandb's own reader."""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from limits import WAIT_S


def inspect_offline_run(folder: Path) -> list[dict[str, Any]]:
    """Give the rows of the offline run below a run folder, without wandb's own columns.

    A run that was resumed has a folder of wandb's for every life; their rows come in order.
    """
    return [
        {key: value for key, value in row.items() if not key.startswith("_")}
        for row in (record["history"]["item"] for record in offline_records(folder, "history"))
    ]


def offline_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Give the records of one kind, such as ``history``, ``summary``, ``run`` or ``exit``."""
    lines = (
        line
        for attempt in offline_folders(folder)
        for file in sorted(attempt.glob("*.wandb"))  # none if it was killed before
        for line in _inspect(file).splitlines()
    )
    return [record for record in map(json.loads, lines) if record["type"] == kind]


def offline_summary(folder: Path) -> dict[str, Any]:
    """Give the last value of every key of the summary."""
    summary: dict[str, Any] = {}
    for record in offline_records(folder, "summary"):
        summary.update(record["summary"]["update"])
    return summary


def offline_folder(folder: Path) -> Path:
    """Give wandb's folder of the one offline life below a run folder."""
    (found,) = offline_folders(folder)
    return found


def offline_folders(folder: Path) -> list[Path]:
    """Give wandb's folders of all offline lives below a run folder, the first one first."""
    return sorted((folder / "wandb").glob("offline-run-*"))


def _inspect(file: Path) -> str:
    """Run what ``wandb leet inspect --json`` starts, without the second of its imports."""
    (package,) = find_spec("wandb").submodule_search_locations
    options = ("--no-observability", "--json", "--run-file", file, file.parents[1])
    command = [f"{package}/bin/wandb-core", "leet", "inspect", *map(str, options)]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=WAIT_S
    ).stdout
