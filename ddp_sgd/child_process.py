"""Child process of a rank, for work that would take time from training. No torch."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

from ddp_sgd.console import fill_descriptors, outlive_console

_HELD_BACK = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a terminal or SLURM sends to all processes of a job; the rank says when it is over."""


def start_child_process(
    module: str, *, hears: int = subprocess.PIPE, says: int = subprocess.PIPE, niceness: int = 0
) -> subprocess.Popen[bytes]:
    """Start a Python that finds modules where this one does, deaf to what is for the rank.

    Signals that are blocked stay blocked in a process that is started meanwhile.

    Args:
        module: Its ``main`` is called; it begins by ``serve_the_rank``.
        hears: What it reads from, as ``subprocess`` takes it.
        says: What it writes to.
        niceness: How far it steps back where CPUs are short, in [0, 19].

    Returns:
        The process.

    Raises:
        OSError: The system has no process left for us.
    """
    fill_descriptors()
    work = f"from {module} import main; main()"
    path = list(map(str, sys.path))
    command = f"import os, sys; os.nice({niceness}); sys.path[:] = {path}; {work}"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        return subprocess.Popen([sys.executable, "-c", command], stdin=hears, stdout=says)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve_the_rank() -> tuple[int, int]:
    """Start as a child process: take the pipes, and end as soon as the rank is gone.

    Returns:
        Descriptors of what the rank says, and of what it is told. Whatever else is printed goes to
        stderr.
    """
    said, told, held = os.dup(0), os.dup(1), os.dup(0)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    outlive_console()
    Thread(target=_leave_with_the_rank, args=(held,), daemon=True).start()
    return said, told


def _leave_with_the_rank(descriptor: int) -> None:
    """End this process as soon as nobody holds the other end of its stdin any more.

    Args:
        descriptor: Of its own, never closed: one that is closed at the end looks like a hang-up.
    """
    poll = select.poll()
    poll.register(descriptor, 0)  # a hang-up is told unasked, also while messages wait to be read
    poll.poll()
    os._exit(1)
