"""Rank, world size and rendezvous endpoint, as torchrun, srun or nothing give them. No torch.

The SLURM job that this process belongs to, if any: its name, its attempts, its end.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ddp_sgd.errors import ConfigError, RemoteError, StopInterrupt, StoppedError
from ddp_sgd.host import scaled

_HEAD_START_S = scaled(2.0)
"""How long a rank whose error another one reports leaves that one the time to do so."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
_SRUN_ENDPOINT = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among all.

    Args:
        rank: Number of this process, in [0, world_size).
        world_size: Number of processes.
        local_rank: Number of this process on its machine.
        local_world_size: Processes on this machine, if the launcher sets it; else world_size.
        launcher: ``torchrun``, ``srun`` or ``none``.
        address: Host where the ranks meet.
        port: Port where the ranks meet, in [1, 65535].
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str
    address: str = "localhost"
    port: int = 0

    @property
    def alone(self) -> bool:
        """Whether there is one process only, so that no group is needed."""
        return self.world_size == 1


def read_ranks(environ: Mapping[str, str]) -> Ranks:
    """Find out which process this is.

    torchrun's variables come first, then srun's; with neither there is one process.

    Raises:
        ConfigError: Only some of a launcher's variables are set, or they contradict each other.
    """
    if any(name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return _from_torchrun(environ)
    if "SLURM_PROCID" in environ and not _in_batch_shell(environ):
        return _from_srun(environ)
    return Ranks(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="none")


@contextmanager
def only_on_rank(*, this_one: bool) -> Iterator[None]:
    """Report from one process only what every one finds by itself: a wrong configuration, a stop.

    Args:
        this_one: Whether this process reports.

    Raises:
        RemoteError: In place of a ``ConfigError`` or a ``StoppedError``, on the others.
        StoppedError: A signal came before the first step.
    """
    try:
        try:
            yield
        except StopInterrupt as interrupt:
            raise interrupt.as_error() from None
    except (ConfigError, StoppedError) as error:
        if this_one:
            raise
        if isinstance(error, ConfigError) and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(_HEAD_START_S)  # torchrun ends all others as soon as one has ended
        raise RemoteError(str(error), error.exit_code) from error


def may_be_rank_0(environ: Mapping[str, str]) -> bool:
    """Whether this process is rank 0, or no other can be known to be."""
    for rank, world_size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        number, count = environ.get(rank, ""), environ.get(world_size, "")
        if number.isdigit() and count.isdigit() and int(number) < int(count):
            return int(number) == 0
    return True


def is_orphaned(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's agent that started this process is gone."""
    return "TORCHELASTIC_RUN_ID" in environ and os.getppid() != _parent


def _note_parent() -> None:
    """Record the parent process at once: the agent may die while torch is imported."""
    global _parent  # noqa: PLW0603
    _parent = os.getppid()


_parent = os.getppid()
os.register_at_fork(after_in_child=_note_parent)


def first_host(node_list: str) -> str:
    """First host of a SLURM node list, such as ``node03`` of ``node[03-07,12],other``.

    Source:
        The notation is that of ``scontrol show hostnames``, which need not be there inside a
        container.
    """
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", node_list.strip())
    if not match:
        raise ConfigError(
            f"SLURM_JOB_NODELIST is {node_list!r}; it must name hosts, such as node[01-04]."
        )
    prefix, first, suffix = match.groups()
    return prefix + (first or "") + (suffix or "")


def port_of_job(job: int) -> int:
    """Port for the rendezvous of a SLURM job: jobs that share a node have numbers of their own."""
    return 10_000 + job % 20_000


def tasks_of_nodes(counts: str) -> list[int]:
    """Tasks of each node of a SLURM job: 4, 4 and 3 of ``4(x2),3``.

    Args:
        counts: Value of ``SLURM_TASKS_PER_NODE``.
    """
    expanded: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        expanded += [int(count)] * int(repeat or 1)
    return expanded


def _from_torchrun(environ: Mapping[str, str]) -> Ranks:
    _refuse_half_set(environ, _TORCHRUN, "torchrun", alone_without=_TORCHRUN[:3])
    world_size = _number(environ, "WORLD_SIZE", least=1)
    return Ranks(
        rank=_number(environ, "RANK", most=world_size - 1),
        world_size=world_size,
        local_rank=_number(environ, "LOCAL_RANK", most=world_size - 1),
        local_world_size=_number(environ, "LOCAL_WORLD_SIZE", least=1, most=world_size)
        if "LOCAL_WORLD_SIZE" in environ
        else world_size,
        launcher="torchrun",
        address=environ["MASTER_ADDR"],
        port=_number(environ, "MASTER_PORT", least=1, most=65_535),
    )


def _refuse_half_set(
    environ: Mapping[str, str],
    names: Sequence[str],
    launcher: str,
    *,
    alone_without: Sequence[str],
) -> None:
    """Name the variables of a launcher that are missing, given that it set others."""
    missing = [name for name in names if not environ.get(name)]
    present = [name for name in alone_without if environ.get(name)] or alone_without[:1]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            f"{' '.join(missing)} {verb} not set, though {' '.join(present)} is; start with "
            f"{launcher}, or unset {' '.join(alone_without)} to run one process."
        )


def _in_batch_shell(environ: Mapping[str, str]) -> bool:
    """A batch script has a task number, but no task count unless one was requested."""
    return "SLURM_NTASKS" not in environ and "SLURM_JOB_ID" in environ


def _from_srun(environ: Mapping[str, str]) -> Ranks:
    _refuse_half_set(environ, _SRUN, "srun", alone_without=_SRUN[:1])
    world_size = _number(environ, "SLURM_NTASKS", least=1)
    _refuse_lone_shell(environ, world_size)
    address, port = ("localhost", 0) if world_size == 1 else _srun_endpoint(environ)
    return Ranks(
        rank=_number(environ, "SLURM_PROCID", most=world_size - 1),
        world_size=world_size,
        local_rank=_number(environ, "SLURM_LOCALID", most=world_size - 1),
        local_world_size=_tasks_on_this_node(environ, world_size),
        launcher="srun",
        address=address,
        port=port,
    )


def _refuse_lone_shell(environ: Mapping[str, str], world_size: int) -> None:
    """Refuse to wait for tasks that were not started."""
    if world_size > 1 and (shell := find_lone_shell(environ)):
        raise ConfigError(
            f"SLURM_NTASKS is {world_size}, but this process was started alone, from {shell}; "
            f"start all with srun --overlap --ntasks={world_size} in front of the command, or "
            "unset SLURM_PROCID to run one process."
        )


def _srun_endpoint(environ: Mapping[str, str]) -> tuple[str, int]:
    """Take the first node, and a port that follows from the job, unless the user chose."""
    job, *lists = _SRUN_ENDPOINT
    nodes = next((environ[name] for name in lists if environ.get(name)), None)
    address = environ.get("MASTER_ADDR") or (first_host(nodes) if nodes else None)
    if not address:
        raise ConfigError(
            "SLURM_JOB_NODELIST is not set, though SLURM_NTASKS is above 1; start with srun, or "
            "set MASTER_ADDR."
        )
    if environ.get("MASTER_PORT"):
        return address, _number(environ, "MASTER_PORT", least=1, most=65_535)
    if not environ.get(job):
        raise ConfigError(
            f"{job} is not set, though SLURM_NTASKS is above 1; start with srun, or set "
            "MASTER_PORT."
        )
    return address, port_of_job(_number(environ, job))


def _tasks_on_this_node(environ: Mapping[str, str], world_size: int) -> int:
    """Read ``4(x2),3`` at the place of this node; sites differ in which variables they set."""
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    expanded = tasks_of_nodes(counts)
    node = environ.get("SLURM_NODEID", "0")
    if node.isdigit() and int(node) < len(expanded):
        return max(1, min(expanded[int(node)], world_size))
    return world_size


def _number(
    environ: Mapping[str, str], name: str, *, least: int = 0, most: int | None = None
) -> int:
    text = environ[name]
    value = int(text) if text.isascii() and text.isdigit() else -1
    if value < least or (most is not None and value > most):
        span = f"from {least} to {most}" if most is not None else f"of at least {least}"
        raise ConfigError(
            f"{name} is {text!r}; it must be a whole number {span}: start with torchrun or srun, "
            "which set it."
        )
    return value


_INTERACTIVE_STEP = "4294967290"
"""Number of the step in which salloc runs its shell, where ``use_interactive_step`` is set."""
_SHELLS = ("sh", "bash", "dash", "zsh", "ksh", "fish", "csh", "tcsh")


def attempt_of_job(environ: Mapping[str, str]) -> str | None:
    """Name one attempt of a job, as ``1234.1`` after its first requeue; None outside of SLURM."""
    job = environ.get("SLURM_JOB_ID")
    return f"{job}.{times_requeued(environ)}" if job else None


def name_of_job(environ: Mapping[str, str]) -> str | None:
    """Name a job for SLURM's commands; None outside of SLURM.

    The number of one task of an array is that of the whole array.
    """
    if environ.get("SLURM_ARRAY_TASK_ID"):
        return f"{environ.get('SLURM_ARRAY_JOB_ID')}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ.get("SLURM_JOB_ID")


def times_requeued(environ: Mapping[str, str]) -> int:
    """How often the job was put back into the queue, by whomever; at least 0."""
    count = environ.get("SLURM_RESTART_COUNT", "")
    return int(count) if count.isdigit() else 0


def end_of_job(environ: Mapping[str, str]) -> float | None:
    """When the job reaches its time limit, unix time in seconds; None if not known."""
    if environ.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(environ["SLURM_JOB_END_TIME"])
    job = name_of_job(environ)
    return _ask_for_end(job) if job else None


def find_lone_shell(environ: Mapping[str, str]) -> str | None:
    """Name the shell of a job below which this process runs, where nothing starts the other tasks.

    Such a shell has the variables of task 0, with the number of tasks of the whole job.

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
    """Query the end of a job; releases of SLURM before 23.02 do not put it into environments."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=scaled(5.0), check=True
        )
        return datetime.fromisoformat(answer.stdout.strip()).astimezone().timestamp()
    return None
