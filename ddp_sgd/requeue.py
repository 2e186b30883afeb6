"""Command: prepare a SLURM job, and after an attempt decide whether it is requeued, and print why.

Batch scripts call it with the options of the run; it touches nothing of SLURM itself.
"""

import json
import os
import shlex
import socket
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from ddp_sgd.checkpointing.store import FOLDER_NAME, CheckpointFolder
from ddp_sgd.cli import run_command
from ddp_sgd.config import CommandLine
from ddp_sgd.console import deliver, say
from ddp_sgd.distributed.environment import (
    attempt_of_job,
    first_host,
    name_of_job,
    port_of_job,
    tasks_of_nodes,
    times_requeued,
)
from ddp_sgd.distributed.process_exit import EXIT_CODE_FILE
from ddp_sgd.errors import ConfigError, DataError, ExitCode, OutputError
from ddp_sgd.files import replace_file
from ddp_sgd.report.journal import read_journal
from ddp_sgd.report.run_folder import BEGINNINGS, result_from_rows, write_result

_LOST_LINE = (
    "rank 0 ended without a result; look for its last lines in logs/, and whether its host or its "
    "memory failed."
)
_PORT_STEP = 1009
"""Distance to the next port where one is taken; a prime, so that jobs in a row do not collide."""
_HIGHEST_PORT = 65_535


@dataclass(frozen=True, slots=True, kw_only=True)
class JobAttempt:
    """How one attempt of a job ended.

    Args:
        exit_code: Exit code of the run; None if no rank left one.
        began_at: Samples of the run when this attempt began; None if it did not get that far.
        saved_at: Samples in the newest checkpoint, at least 0.
        requeues: How often the job was requeued before.
        job_state: State of the job by now, as ``squeue`` has it.
    """

    exit_code: int | None
    began_at: int | None
    saved_at: int
    requeues: int
    job_state: str


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--prepare",
        action="store_true",
        help="before an attempt: make the folder of the logs, and print where the ranks meet, how "
        "many there are and where they log, as variables of a shell",
    )
    parser.add_argument(
        "--tasks_per_node",
        metavar="TEXT",
        help="tasks of each node, as SLURM_TASKS_PER_NODE of the batch script has them: a step, "
        "such as a container, has others there; for --prepare",
    )
    parser.add_argument(
        "--exit_code",
        type=int,
        metavar="N",
        help="exit code that a rank left, in case rank 0 wrote no result; left out if none did",
    )
    parser.add_argument(
        "--launcher_code", type=int, default=0, metavar="N", help="what srun ended with"
    )
    parser.add_argument(
        "--job_state",
        default="RUNNING",
        metavar="TEXT",
        help="state of the job by now, as squeue has it (default: RUNNING)",
    )
    parser.add_argument(
        "--max_requeues",
        type=int,
        default=100,
        metavar="N",
        help="how often the job may go back into the queue, at least 0 (default: 100)",
    )
    parser.add_argument(
        "--answer",
        metavar="FILE",
        help="file that is made if the job is to be requeued; it holds 'now', or 'later' where a "
        "node may be dead, which SLURM notices by itself after a while",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Decide, and return the exit code of the run; or prepare a job.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
    """
    return run_command(
        lambda line: prepare(line) if line.options["prepare"] else requeue(line),
        argv,
        program="python -m ddp_sgd.requeue",
        about="Decide whether a SLURM job goes back into the queue, by result.json, the journal "
        "and the checkpoints of its run; or, before it runs, prepare it. The batch scripts in "
        "slurm/ call it.",
        add_options=_add_options,
    )


def prepare(line: CommandLine) -> int:
    """Make the folder of the logs, and print the variables.

    Raises:
        OutputError: The folder cannot be made.
    """
    config = line.config
    folder = Path(config.output_dir) / config.name
    given = line.options["tasks_per_node"]
    environ = os.environ if given is None else {**os.environ, "SLURM_TASKS_PER_NODE": given}
    variables = describe_job(environ, folder, ceil(config.runtime.timeout_s))
    logs = Path(variables["logs"])
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{logs} cannot be written; set output_dir to a folder that you may write."
        ) from error
    deliver("".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()))
    return ExitCode.DONE


def describe_job(environ: Mapping[str, str], folder: Path, timeout_s: int) -> dict[str, str]:
    """Derive the variables of a job from the environment of its batch script.

    Args:
        environ: The environment, such as ``os.environ``.
        folder: The run folder.
        timeout_s: How long ranks wait for each other.

    Returns:
        Values by name: those in lower case are the script's, the others also those of the ranks.

    Raises:
        ConfigError: This is no SLURM job.
    """
    attempt, job = attempt_of_job(environ), name_of_job(environ)
    number = environ.get("SLURM_JOB_ID", "")
    if attempt is None or job is None or not number.isdigit():
        raise ConfigError(
            "SLURM_JOB_ID is not set; submit a script of slurm/ with sbatch, or start the run with "
            "python -m ddp_sgd.launch."
        )
    # The run folder is made by rank 0, so the logs begin beside it.
    logs = folder.with_name(f"{folder.name}.logs") / attempt
    tasks = tasks_of_nodes(environ.get("SLURM_TASKS_PER_NODE", ""))
    return {
        "job": job,
        "attempt": attempt,
        "folder": str(folder),
        "logs": str(logs),
        "MASTER_ADDR": first_host(environ.get("SLURM_JOB_NODELIST", "")),
        "MASTER_PORT": str(find_port(port_of_job(int(number)))),
        "TIMEOUT_S": str(timeout_s),
        "RANKS_OF_NODES": " ".join(map(str, tasks)),
        EXIT_CODE_FILE: str(logs / "exit_code"),
    }


def find_port(port: int) -> int:
    """Find a port that no other program listens on, at a port or some way above it.

    Raises:
        ConfigError: All are taken.
    """
    for candidate in range(port, _HIGHEST_PORT, _PORT_STEP):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", candidate)) != 0:
                return candidate
    raise ConfigError(
        f"port {port} is taken, as is every {_PORT_STEP}th above it; submit the job again."
    )


def requeue(line: CommandLine) -> int:
    """Decide, print why, write it into ``result.json``, and leave the decision for the script.

    Args:
        line: The configuration of the run, and what the batch script knows.

    Returns:
        The exit code of the run.
    """
    asked = line.options
    folder = Path(line.config.output_dir) / line.config.name
    name = attempt_of_job(os.environ)
    rows, result = _rows(folder), _result(folder, name)
    attempt = JobAttempt(
        exit_code=result.get("exit_code", asked["exit_code"]),
        began_at=_begin(rows, name),
        saved_at=_saved(folder),
        requeues=times_requeued(os.environ),
        job_state=asked["job_state"],
    )
    if attempt.exit_code == ExitCode.DONE:
        return ExitCode.DONE
    obstacle = why_not(attempt, max_requeues=asked["max_requeues"])
    end = _end(attempt, asked["launcher_code"])
    reason = f"{end}: {f'not requeued, since {obstacle}' if obstacle else 'requeued'}"
    decision = {"requeued": obstacle is None, "requeue_reason": reason}
    if attempt.began_at is not None and not result:
        result = {**result_from_rows(rows, exit_code=ExitCode.PEER, error=_LOST_LINE), "job": name}
    try:
        if result:
            write_result(folder / "result.json", {**result, **decision})
    finally:  # the result is there before the line
        say(f"ddp_sgd: {reason}")
    if obstacle is None and asked["answer"]:
        stopped = attempt.exit_code == ExitCode.STOPPED
        replace_file(Path(asked["answer"]), "now\n" if stopped else "later\n")
    return int(ExitCode.PEER if attempt.exit_code is None else attempt.exit_code)


def why_not(attempt: JobAttempt, *, max_requeues: int) -> str | None:
    """Return why a job is not requeued; None if it is.

    A job goes on if it was stopped, or lost a machine, and saved a step since it began; not if it
    failed, which a person has to look at, and not if SLURM ends or requeues it by itself.
    """
    if attempt.exit_code not in (ExitCode.STOPPED, ExitCode.PEER, None):
        return "what failed would fail again"
    if attempt.job_state != "RUNNING":
        return f"SLURM itself ends or requeues it (the job is {attempt.job_state or 'gone'})"
    if attempt.began_at is None:
        return "the run did not begin"
    if attempt.saved_at <= attempt.began_at:
        return "no step was saved since it began"
    if attempt.requeues >= max_requeues:
        return f"it was requeued {attempt.requeues} times and MAX_REQUEUES is {max_requeues}"
    return None


def _end(attempt: JobAttempt, launcher_code: int) -> str:
    if attempt.exit_code is None:
        return f"no rank left an exit code, srun ended with code {launcher_code}"
    return "stopped" if attempt.exit_code == ExitCode.STOPPED else f"exit code {attempt.exit_code}"


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        return read_journal(folder / "metrics.jsonl")
    except DataError:  # there is none, or another run's
        return []


def _begin(rows: Sequence[Mapping[str, Any]], attempt: str | None) -> int | None:
    """Samples of the run when this attempt began; None if it did not get that far."""
    begins = [row for row in rows if row["event"] in BEGINNINGS]
    if attempt is None or not begins or begins[-1].get("job") != attempt:
        return None
    return int(begins[-1]["samples"])


def _saved(folder: Path) -> int:
    manifests = CheckpointFolder(folder / FOLDER_NAME).manifests()
    return manifests[-1].header.samples if manifests else 0


def _result(folder: Path, attempt: str | None) -> dict[str, Any]:
    """Read the result of this attempt; empty if rank 0 wrote none."""
    try:
        result = json.loads((folder / "result.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return result if attempt and result.get("job") == attempt else {}


if __name__ == "__main__":
    sys.exit(main())
