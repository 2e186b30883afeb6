"""A process beside the rank, for work that would take time from training, and its end. No torch."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread
from typing import IO, BinaryIO

_HELD_BACK = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a terminal or SLURM sends to all processes of a job; the rank says when it is over."""


def start_companion(module: str, *, niceness: int = 0) -> subprocess.Popen[bytes]:
    """Start a Python that finds modules where this one does, deaf to what is for the rank.

    Signals that are blocked stay blocked in a process that is started meanwhile.

    Args:
        module: Its ``main`` is called; it begins by ``serve_the_rank``.
        niceness: How far it steps back where CPUs are short, in [0, 19].

    Returns:
        The process, with a pipe to it and one from it.

    Raises:
        OSError: The system has no process left for us.
    """
    work = f"from {module} import main; main()"
    path = list(map(str, sys.path))
    command = f"import os, sys; os.nice({niceness}); sys.path[:] = {path}; {work}"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # A forked loader process would hold the pipe open for as long as it outlives a killed rank.
    os.register_at_fork(after_in_child=to_companion(process).close)
    return process


def to_companion(process: subprocess.Popen[bytes]) -> IO[bytes]:
    """Return the rank's end of the pipe to a companion."""
    if process.stdin is None:
        raise RuntimeError("the process was started without a pipe")
    return process.stdin


def serve_the_rank() -> tuple[BinaryIO, BinaryIO]:
    """Begin the companion's life: take the pipes for itself, and end as soon as the rank is gone.

    Returns:
        What the rank says, and what it is told. Whatever else is printed goes to stderr.
    """
    said, held = os.fdopen(os.dup(0), "rb"), os.dup(0)
    told = os.fdopen(os.dup(1), "wb")
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
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
