"""Weights & Biases (W&B) logger of the trainer: starts the subprocess that follows the journal.

It can neither delay, hang nor stop training: all that touches wandb happens in the subprocess
(``wandb_follower``), and no row passes through a pipe. One pipe holds the request, and its end says
that the trainer has ended or died; another brings lines for the user.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

from ddp_sgd.config import WandbConfig
from ddp_sgd.console import fill_descriptors
from ddp_sgd.report.journal import EventRow, RunRecord
from ddp_sgd.report.wandb_follower import (
    FINISH_TIMEOUT_S,
    INIT_TIMEOUT_S,
    PROGRAM,
    UPLOAD_TIMEOUT_S,
    FollowRequest,
    is_disabled,
)
from ddp_sgd.time_limits import scaled

_MOST_ARGV = 4000
"""Characters of the command line that W&B shows: with them the pipe takes the request at once."""

_NICENESS = 10
"""Beside a rank that could use all of a CPU the subprocess gets a tenth of it."""

_HELD_BACK = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""What a terminal or SLURM sends to all processes of a job; the trainer says when it is over."""

_ahead: list[subprocess.Popen[bytes]] = []
"""The subprocess that ``start_ahead`` has started, until a logger takes it."""


def start_ahead(config: WandbConfig) -> None:
    """Start the subprocess of the next run, so that it imports wandb while torch is being imported.

    Unless it is taken by a logger it ends with this process.

    Args:
        config: Section ``wandb`` of the configuration.
    """
    with suppress(OSError):  # whatever is wrong, the logger finds out again
        if not _ahead and not is_disabled(config):
            _ahead.append(_start_process())


class WandbLogger:
    """Logs a run to W&B, or to files for ``wandb sync`` where there is no server or no key.

    Args:
        config: Section ``wandb`` of the configuration.
        say: Prints one plain line for the user; it is called from a thread of the logger's own.
    """

    def __init__(self, config: WandbConfig, *, say: Callable[[str], None]) -> None:
        """Keep the configuration; nothing is started yet."""
        self._config = config
        self._print = say
        self._process: subprocess.Popen[bytes] | None = None
        self._listener = Thread(target=self._listen, name="wandb lines", daemon=True)
        self._folder = Path()
        self._is_killed = False

    def start(self, record: RunRecord) -> None:
        """Start the subprocess that opens the run, unless W&B is disabled."""
        if is_disabled(self._config):
            return
        self._folder = record.folder
        request = FollowRequest(
            folder=str(record.folder.absolute()),
            run_id=record.origin.run_id,
            resumed=record.origin.has_rows,
            mode=None,
            trainer=os.getpid(),
            argv=sys.argv if sum(map(len, sys.argv)) < _MOST_ARGV else sys.argv[:1],
            init_timeout_s=scaled(INIT_TIMEOUT_S),
            upload_timeout_s=scaled(UPLOAD_TIMEOUT_S),
        )
        try:
            self._process = _ahead.pop() if _ahead else _start_process()
            self._listener.start()
        except (OSError, RuntimeError) as error:  # the system has no process or thread left for us
            self._say(f"not started ({error}); metrics.jsonl has every row")
            self._kill()
            return
        with suppress(OSError):  # the subprocess is gone, and the listener reports it
            os.write(_stdin(self._process).fileno(), json.dumps(request).encode() + b"\n")

    def write(self, rows: Sequence[EventRow]) -> None:
        """Do nothing: the subprocess reads the rows from the journal."""

    def finish(self, result: Mapping[str, Any]) -> None:  # noqa: ARG002  it is in result.json
        """Close the run, and wait for that at most ``FINISH_TIMEOUT_S``."""
        if self._process is None:
            return
        limit_s = scaled(FINISH_TIMEOUT_S)
        _stdin(self._process).close()
        self._listener.join(limit_s)
        if self._listener.is_alive():
            self._say(f"not finished after {limit_s:g} s; complete it: {PROGRAM} {self._folder}")
            self._kill()

    def _say(self, text: str) -> None:
        self._print(f"W&B: {text}")

    def _listen(self) -> None:
        """Print lines of the subprocess until it ends, and how it ended unless by itself."""
        process = self._process
        if process is None or process.stdout is None:
            return
        with process.stdout as lines:
            for line in lines:
                self._say(line.decode(errors="replace").rstrip("\n"))
        code = process.wait()
        if code and not self._is_killed:
            self._say(
                f"stopped (its process ended with code {code}); training goes on, metrics.jsonl "
                "has every row"
            )

    def _kill(self) -> None:
        """End the subprocess, if there is one, whatever it does; wandb's helper follows it."""
        self._is_killed = True
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            _stdin(process).close()
            if process.stdout and self._listener.ident is None:  # else that one closes it
                process.stdout.close()


def _start_process() -> subprocess.Popen[bytes]:
    """Start the subprocess with this one's modules, without the signals that are for the trainer.

    Signals that are blocked stay blocked in a process that is started meanwhile.
    """
    fill_descriptors()
    work = "from ddp_sgd.report.wandb_follower import follow_trainer; follow_trainer()"
    path = list(map(str, sys.path))
    command = f"import os, sys; os.nice({_NICENESS}); sys.path[:] = {path}; {work}"
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # A forked loader process would hold the pipe open for as long as it outlives a killed rank.
    os.register_at_fork(after_in_child=_stdin(process).close)
    return process


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdin is None:
        raise RuntimeError("the process was started without a pipe")
    return process.stdin
