"""The SLURM job that this process belongs to, if any. No torch."""

import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from ddp_sgd.host import scaled

_INTERACTIVE_STEP = "4294967290"
"""Number of the step in which salloc runs its shell, where ``use_interactive_step`` is set."""
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh")


def life_of_job(environ: Mapping[str, str]) -> str | None:
    """Name one life of a job, such as ``1234.1`` after its first requeue; None outside of SLURM.

    Args:
        environ: The environment, such as ``os.environ``.
    """
    job = environ.get("SLURM_JOB_ID")
    return f"{job}.{times_requeued(environ)}" if job else None


def name_of_job(environ: Mapping[str, str]) -> str | None:
    """Name a job for SLURM's commands; None outside of SLURM.

    The number of one task of an array is that of the whole array.

    Args:
        environ: The environment, such as ``os.environ``.
    """
    if environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{environ.get('SLURM_ARRAY_JOB_ID')}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def times_requeued(environ: Mapping[str, str]) -> int:
    """How often the job was put back into the queue, by whomever; at least 0."""
    count = environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def end_of_job(environ: Mapping[str, str]) -> float | None:
    """When the job reaches its time limit, unix time in seconds; None if nobody says."""
    if environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(environ["SLURM_JOB_END_TIME"])
    job = name_of_job(environ)
    return _ask_for_end(job) if job else None


def find_lone_shell(environ: Mapping[str, str]) -> str | None:
    """Name the shell of a job below which this process runs, where nothing starts the other tasks.

    Such a shell has the variables of task 0, with the number of tasks of the whole job.

    Args:
        environ: The environment, such as ``os.environ``.

    Returns:
        What the shell is, for an error; None if this process is a task of a step.
    """
    task = environ.get("SLURM_TASK_PID", "")
    step = environ.get("SLURM_STEP_ID") or environ.get("SLURM_STEPID")
    if task and not step:
        return "the batch script"
    # srun --pty gives the terminal to task 0; the same shell of the others reads an empty input.
    if step == _INTERACTIVE_STEP or ("SLURM_PTY_PORT" in environ and _is_bare_shell(task)):
        return "an interactive shell"
    return None


def _is_bare_shell(process: str) -> bool:
    """Whether a process of this host is a shell that was given neither a script nor a command."""
    with suppress(OSError, ValueError):
        text = Path(f"/proc/{int(process)}/cmdline").read_text()
        name, *words = text.rstrip("\0").split("\0")
        is_shell = name.rpartition("/")[2].lstrip("-") in _SHELLS
        return is_shell and all(word.startswith("-") and word != "-c" for word in words)
    return False


def _ask_for_end(job: str) -> float | None:
    """Ask for the end of a job; releases of SLURM before 23.02 do not put it into environments."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=scaled(5.0), check=True
        )
        return datetime.fromisoformat(answer.stdout.strip()).astimezone().timestamp()
    return None
