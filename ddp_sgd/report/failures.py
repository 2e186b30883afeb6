"""What went wrong in earlier lives of a run, so that a restart that mends nothing has an end.

Only failures that a rank told of itself count. A lost peer says nothing about the run: hosts die.
"""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_sgd.errors import ExitCode, RepeatedFailureError

FILE_NAME = "failures.jsonl"
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "LAUNCH_RESTART_COUNT")

SAME_STEP = 3
"""Failures in a row at one step after which a run is not started again by its launcher."""


def note_failure(folder: Path, step: int, code: int, error: str) -> None:
    """Append a failure; one of the world around is not noted.

    The row says ``gives_up`` if it is the last that is allowed, so that the launcher can end
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

    A run that is started afresh, by a person, gets all its chances anew.

    Args:
        folder: The run folder.
        environ: The environment, which says whether this is a restart.

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
            f"again; mend what ended it: {row['error']}",
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
