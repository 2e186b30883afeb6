"""The SLURM job that this process belongs to, if any. No torch."""

import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime

from ddp_sgd.time_limits import scaled


def life_of_job(environ: Mapping[str, str]) -> str | None:
    """Name one life of a job, such as ``1234.1`` after its first requeue; None outside of SLURM.

    Args:
        environ: The environment, such as ``os.environ``.
    """
    job = environ.get("SLURM_JOB_ID")
    return f"{job}.{times_requeued(environ)}" if job else None


def times_requeued(environ: Mapping[str, str]) -> int:
    """How often the job was put back into the queue, by whomever; at least 0."""
    count = environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def end_of_job(environ: Mapping[str, str]) -> float | None:
    """When the job reaches its time limit, unix time in seconds; None if nobody says."""
    if environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(environ["SLURM_JOB_END_TIME"])
    job = _name_of_job(environ)
    return _ask_for_end(job) if job else None


def _name_of_job(environ: Mapping[str, str]) -> str | None:
    """Name a job for SLURM's commands; the number of one task is that of its whole array."""
    if environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{environ.get('SLURM_ARRAY_JOB_ID')}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def _ask_for_end(job: str) -> float | None:
    """Ask for the end of a job; releases of SLURM before 23.02 do not put it into environments."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=scaled(5.0), check=True
        )
        return datetime.fromisoformat(answer.stdout.strip()).astimezone().timestamp()
    return None
