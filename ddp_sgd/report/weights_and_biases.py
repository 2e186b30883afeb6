"""Weights & Biases as a view of the run, which can neither delay, hang nor stop it.

The rank starts a process that does all that touches wandb (``wandb_process``), and sends it rows
through a pipe, as far as they fit without waiting. What fails there ends in one line for the user,
and training goes on. The journal is the truth.
"""

import os
import pickle
import select
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import IO, Any

from ddp_sgd.child_process import start_child_process
from ddp_sgd.config.sections import WandbConfig
from ddp_sgd.report.logger import EventRow, RunRecord
from ddp_sgd.report.wandb_process import Opening
from ddp_sgd.time_limits import scaled

INIT_TIMEOUT_S = 10.0
"""How long wandb may try its server, which takes under a second on a good link, before the run goes
offline."""

UPLOAD_TIMEOUT_S = 20.0
"""How long wandb may go on uploading at the end."""

FINISH_TIMEOUT_S = 30.0
"""How long ``finish`` waits for the process: an upload that runs into its limit (20 s), or a run
that ends while its server is still being tried (10 s, 2 s to give up, 1 s to go offline), and room
for the rows still on their way."""

MOST_BYTES = 16_000_000
"""Rows that may wait: some 40,000, which take half of FINISH_TIMEOUT_S."""

_NICENESS = 10
"""Beside a rank that could use all of a CPU the process gets a tenth of it."""

_EVENTS = ("train", "eval")

_ahead: list[subprocess.Popen[bytes]] = []
"""The process that ``start_ahead`` has started, until a sink takes it."""


def start_ahead(config: WandbConfig) -> None:
    """Start the process of the next run, so that it imports wandb while torch is being imported.

    Unless it is taken by a sink it ends with this process.

    Args:
        config: Section ``wandb`` of the configuration.
    """
    with suppress(OSError):  # whatever is wrong, the sink finds out again
        if not _ahead and not _is_disabled(config):
            _ahead.append(_start_process())


class WeightsAndBiases:
    """Sends rows to W&B, or keeps them for ``wandb sync`` where there is no server or no key.

    Args:
        config: Section ``wandb`` of the configuration.
        say: Prints one plain line for the user; it is called from a thread of the sink's own.
    """

    def __init__(self, config: WandbConfig, *, say: Callable[[str], None]) -> None:
        """Keep the configuration; nothing is started yet."""
        self._config = config
        self._tell_user = say
        self._process: subprocess.Popen[bytes] | None = None
        self._listener = Thread(target=self._listen, name="wandb lines", daemon=True)
        self._folder = Path()
        self._waiting = bytearray()
        self._is_short = self._is_killed = False

    def start(self, record: RunRecord) -> None:
        """Start the process that opens the run, unless W&B is disabled."""
        if _is_disabled(self._config):
            return
        self._folder = record.folder / "wandb"
        opening = Opening(
            config=self._config,
            record=record,
            rank_pid=os.getpid(),
            argv=sys.argv,
            init_timeout_s=scaled(INIT_TIMEOUT_S),
            upload_timeout_s=scaled(UPLOAD_TIMEOUT_S),
        )
        try:
            self._process = _ahead.pop() if _ahead else _start_process()
            self._listener.start()
        except (OSError, RuntimeError) as error:  # the system has no process or thread left for us
            self._say(f"not started ({error}); metrics.jsonl has every row")
            self._kill()
        else:
            self._waiting += pickle.dumps(opening)
            self._send()

    def write(self, rows: Sequence[EventRow]) -> None:
        """Send rows of training and evaluation; never waits."""
        if self._process is None or self._process.returncode is not None:
            return
        for row in rows:
            if row[0] not in _EVENTS:
                continue
            if len(self._waiting) < MOST_BYTES:
                self._waiting += pickle.dumps(row)
            elif not self._is_short:
                self._is_short = True
                self._say("too many rows wait; some are left out, metrics.jsonl has them")
        self._send()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Close the run, and wait for that at most ``FINISH_TIMEOUT_S``."""
        if self._process is None:
            return
        limit_s = scaled(FINISH_TIMEOUT_S)
        until = time.monotonic() + limit_s
        poll = select.poll()
        poll.register(_stdin(self._process), select.POLLOUT)
        self._waiting += pickle.dumps(("end", dict(result)))
        while self._waiting and (left_s := until - time.monotonic()) > 0:
            poll.poll(1e3 * left_s)
            self._send()
        self._listener.join(max(0.0, until - time.monotonic()))
        if self._listener.is_alive():
            sync = f"wandb sync {self._folder / 'latest-run'}"
            self._say(f"not finished after {limit_s:g} s; send the rest: {sync}")
            self._kill()
        else:
            _stdin(self._process).close()

    def _say(self, text: str) -> None:
        self._tell_user(f"W&B: {text}")

    def _send(self) -> None:
        """Send what fits into the pipe; the rest waits for the next rows."""
        if self._process is None:
            return
        try:
            while self._waiting:
                del self._waiting[: os.write(_stdin(self._process).fileno(), self._waiting)]
        except BlockingIOError:
            pass
        except OSError:  # the process is gone, and the listener tells of it
            self._waiting.clear()

    def _listen(self) -> None:
        """Print what the process says until it ends, and say so if it did not end by itself."""
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
        """End the process, if there is one, whatever it does; wandb's helper follows it."""
        self._is_killed = True
        process, self._process = self._process, None
        if process:
            process.kill()
            process.wait()
            _stdin(process).close()
            if process.stdout and self._listener.ident is None:  # else that one closes it
                process.stdout.close()


def _is_disabled(config: WandbConfig) -> bool:
    mode = os.environ.get("WANDB_MODE") if config.mode == "auto" else config.mode
    return mode == "disabled"


def _start_process() -> subprocess.Popen[bytes]:
    process = start_child_process("ddp_sgd.report.wandb_process", niceness=_NICENESS)
    pipe = _stdin(process)
    os.set_blocking(pipe.fileno(), False)
    # A forked loader process would hold the pipe open for as long as it outlives a killed rank.
    os.register_at_fork(after_in_child=pipe.close)
    return process


def _stdin(process: subprocess.Popen[bytes]) -> IO[bytes]:
    if process.stdin is None:
        raise RuntimeError("the process was started without a pipe")
    return process.stdin
