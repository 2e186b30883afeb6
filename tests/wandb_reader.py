"""Reads W&B runs back from disk by wandb's own reader."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def inspect_offline_run(folder: Path) -> list[dict[str, Any]]:
    """Give the rows of the one offline run below a run folder, without wandb's own columns."""
    return [
        {key: value for key, value in row.items() if not key.startswith("_")}
        for row in (record["history"]["item"] for record in offline_records(folder, "history"))
    ]


def offline_records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Give the records of one kind, such as ``history``, ``summary``, ``run`` or ``exit``."""
    records = (json.loads(line) for line in _leet("--json", offline_folder(folder)).splitlines())
    return [record for record in records if record["type"] == kind]


def offline_summary(folder: Path) -> dict[str, Any]:
    """Give the last value of every key of the summary."""
    summary: dict[str, Any] = {}
    for record in offline_records(folder, "summary"):
        summary.update(record["summary"]["update"])
    return summary


def offline_folder(folder: Path) -> Path:
    """Give wandb's folder of the one offline run below a run folder."""
    (found,) = (folder / "wandb").glob("offline-run-*")
    return found


def _leet(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
