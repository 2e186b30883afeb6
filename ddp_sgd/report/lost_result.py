"""result.json of a run whose rank 0 was killed before it could write one. No torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_sgd.errors import ExitCode, OutputError
from ddp_sgd.files import replace_file

BEGINNINGS = ("start", "resume")
"""Events that an attempt writes into the journal when it begins."""


def result_from_rows(
    rows: Sequence[Mapping[str, Any]], *, exit_code: ExitCode, error: str
) -> dict[str, Any]:
    """Build a result from the journal: it stands where the last row does.

    Args:
        rows: The journal; one row at least says that the run began.
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
    try:
        replace_file(path, json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}; make room on its disk."
        ) from error
