"""Command: prepare a SLURM job, and print as shell variables where its ranks meet and log.

``slurm/job.sh`` evaluates what it prints; what becomes of the job in the end is decided by
``python -m ddp_sgd.requeue``.
"""

import os
import shlex
import socket
import sys
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path

from ddp_sgd.cli import run_command
from ddp_sgd.config import CommandLine
from ddp_sgd.console import deliver
from ddp_sgd.distributed.environment import (
    attempt_of_job,
    first_host,
    name_of_job,
    port_of_job,
    tasks_of_nodes,
)
from ddp_sgd.distributed.process_exit import EXIT_CODE_FILE
from ddp_sgd.errors import ConfigError, OutputError

_PORT_STEP = 1009
"""Distance to the next port where one is taken; a prime, so that jobs in a row do not collide."""
_HIGHEST_PORT = 65_535


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--tasks_per_node",
        metavar="TEXT",
        help="tasks of each node, as SLURM_TASKS_PER_NODE of the batch script has them: a step, "
        "such as a container, has others there",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare a job, and return the exit code of the contract.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
    """
    return run_command(
        prepare,
        argv,
        program="python -m ddp_sgd.slurm_job",
        about="Print where the ranks of a SLURM job meet, how many there are, and where they log, "
        "as variables of a shell; the batch scripts in slurm/ call it.",
        add_options=_add_options,
    )


def prepare(line: CommandLine) -> None:
    """Make the folder of the logs, and print the variables.

    Args:
        line: The configuration of the run.

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

    Args:
        port: The first choice.

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


if __name__ == "__main__":
    sys.exit(main())
