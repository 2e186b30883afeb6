"""torchrun as a child process: start, watch, stop; and what the way it ended means. No torch.

torchrun exits with 1 for any failure, starts workers again that ended on a stop request,
and waits without a timeout for hosts that are gone. ``Torchrun`` watches for these cases,
``Attempt`` holds how one start of torchrun ended, and ``decide`` derives the exit code of the run.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from ddp_sgd.console import settle
from ddp_sgd.distributed.process_exit import ERROR_FILE, EXIT_CODE_FILE
from ddp_sgd.errors import ExitCode
from ddp_sgd.host import scaled
from ddp_sgd.run_files import RunFiles

_POLL_S = 0.05
"""Longest time until a signal is passed on."""
_LOOK_S = 0.25
"""Time between two looks at the files of the run, which may be on a network."""
_ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT)
"""Signals that request the end of a process. A torchrun that another one ended was killed."""
_INTERRUPTED = 128 + signal.SIGINT
"""Exit code after a second Ctrl-C: what a shell gives for a death by SIGINT."""


class StopSignals:
    """Graceful shutdown: signals that stop the launcher, recorded by their handlers.

    Attributes:
        is_requested: Whether there was one.
        is_urgent: Whether there was a second SIGINT: the user does not want to wait.
    """

    def __init__(self) -> None:
        self.is_requested = self.is_urgent = False
        self._interrupts = 0

    def listen(self) -> None:
        """Install the handlers for SIGTERM, SIGUSR1, SIGINT and SIGHUP.

        SIGINT and SIGHUP stay ignored where the parent had them ignored: ``nohup`` and the ``&`` of
        a script do so, in order that a terminal does not end the process.
        """
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            may_be_ignored = number in (signal.SIGINT, signal.SIGHUP)
            if not may_be_ignored or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self.note)

    def note(self, number: int, _: FrameType | None = None) -> None:
        """Note a signal; the handler of all of them."""
        self.is_requested = True
        self._interrupts += number == signal.SIGINT
        self.is_urgent = self._interrupts > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Rendezvous of the machines of a run; without an address, this machine trains alone.

    Args:
        nodes: Number of machines, or ``MIN:MAX``.
        address: Name of the machine that hosts it.
        port: Port on it.
        run_id: Distinguishes the run from others at the same port; empty for its name.
        is_host: Whether this machine hosts it; None leaves it to torchrun.
        remedy: What to do where the machines do not find each other.
    """

    nodes: str = "1"
    address: str = ""
    port: str = ""
    run_id: str = ""
    is_host: bool | None = None
    remedy: str = "start it again."

    @property
    def is_standalone(self) -> bool:
        """Whether all workers are on this machine."""
        return not self.address

    @property
    def is_elastic(self) -> bool:
        """Whether machines may leave and join."""
        return ":" in self.nodes

    def __str__(self) -> str:
        if self.is_standalone:
            return "torchrun on one host"
        return f"{self.nodes} machines at {self.address}:{self.port}"


class Ending(Enum):
    """Why the launcher ended a torchrun."""

    STOPPED = "started workers again that had ended on request"
    GAVE_UP = "started workers again that had failed at one step three times"
    SPARE = "waited for other machines in vain"
    STUCK = "waited for a host that is gone, after its workers had ended"
    INTERRUPTED = "the user pressed Ctrl-C twice"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One start of torchrun, with its attempts of workers, from its start to its end.

    Args:
        returncode: What torchrun ended with; negative for the signal that killed it.
        ending: Why the launcher ended it; None if it ended otherwise.
        has_begun: Whether it started workers.
        error: Content of torchrun's own error file; empty if there is none.
    """

    returncode: int
    ending: Ending | None = None
    has_begun: bool = True
    error: str = ""

    @property
    def is_killed(self) -> bool:
        """Whether torchrun was killed, so that its workers go on for a moment without it."""
        return self.ending is None and self.returncode < 0 and -self.returncode not in _ASKED

    @property
    def loss(self) -> str | None:
        """Why torchrun ended for another reason than the run; None if it did not."""
        if self.is_killed:
            return f"torchrun was ended by {_name_of_signal(-self.returncode)}"
        has_lost_host = self.has_begun and "RendezvousConnectionError" in self.error
        if self.ending is Ending.STUCK or has_lost_host:
            return "torchrun lost the machine where all meet"
        return None


class End(NamedTuple):
    """How a run ended, as the launcher reports it.

    Args:
        code: Exit code of the run.
        error: For the user; empty if there is none, or a rank printed it.
        is_from_result: Whether the code is that of ``result.json``.
    """

    code: int
    error: str = ""
    is_from_result: bool = False


def decide(
    attempt: Attempt,
    rendezvous: Rendezvous,
    timeout_s: int,
    *,
    result_code: int | None = None,
    left_code: int | None = None,
    is_reported: bool = False,
    is_stopped: bool = False,
) -> End:
    """Derive the exit code of a run that is not restarted.

    Args:
        attempt: The last start of torchrun.
        rendezvous: Where its machines meet.
        timeout_s: How long they wait for each other.
        result_code: Exit code in the ``result.json`` that this launch wrote; None if it did not.
        left_code: Exit code that a rank left for its launcher; None if none did.
        is_reported: Whether a rank printed an error.
        is_stopped: Whether the launcher or the workers had a stop request.
    """
    if attempt.ending is Ending.INTERRUPTED:
        return End(_INTERRUPTED)
    if attempt.loss and attempt.ending is not Ending.STUCK and not is_stopped:
        line = f"{attempt.loss}; its processes save and end by themselves, start it again."
        return End(ExitCode.PEER, "" if is_reported else line)
    if result_code is not None:
        return End(result_code, is_from_result=True)
    if is_stopped:
        return End(ExitCode.STOPPED)
    if left_code is not None:
        return End(left_code)
    return _explain(attempt, rendezvous, timeout_s)


def _explain(attempt: Attempt, rendezvous: Rendezvous, timeout_s: int) -> End:
    """Derive the exit code from what torchrun reports, where no rank left anything."""
    if "EADDRINUSE" in attempt.error:
        return End(
            ExitCode.PEER,
            f"port {rendezvous.port} on {rendezvous.address} is held by another program; set "
            "MASTER_PORT to a free one, the same on every machine.",
        )
    if attempt.ending is Ending.SPARE or re.search("Rendezvous[A-Za-z]*Error", attempt.error):
        waited = f"did not come together within {timeout_s} s"
        return End(ExitCode.PEER, f"{rendezvous} {waited}; {rendezvous.remedy}")
    worker = re.search("exitcode *: ([1-9][0-9]*)", attempt.error)
    if attempt.returncode == 1 and worker:
        return End(int(worker[1]))
    code = attempt.returncode
    return End(code if code >= 0 else 128 - code)  # as a shell has it, for a death by a signal


class Torchrun:
    """torchrun as a child process that is watched, and gets one signal at most.

    Args:
        files: Files of this launch.
        rendezvous: Where its machines meet.
        timeout_s: How long machines wait for each other.
        has_restarts: Whether ``--max-restarts`` is above 0: then torchrun may wait for a new host.
    """

    def __init__(
        self, files: RunFiles, rendezvous: Rendezvous, timeout_s: int, *, has_restarts: bool
    ) -> None:
        self._files = files
        self._rendezvous = rendezvous
        self._spare_s = timeout_s + scaled(10.0)
        self._stuck_s = timeout_s + scaled(20.0) if has_restarts else scaled(5.0)

    def run(self, flags: Sequence[str], environ: Mapping[str, str], stop: StopSignals) -> Attempt:
        """Run torchrun to its end.

        Args:
            flags: Of torchrun, with the program and its options.
            environ: Its environment.
            stop: Is passed on to torchrun, once.
        """
        files = self._files
        files.begin_attempt()
        begun = len(files.attempts())
        process = subprocess.Popen(
            [sys.executable, "-m", "ddp_sgd.torchrun", str(files.entered), *flags],
            env={
                **environ,
                EXIT_CODE_FILE: str(files.exit_code),
                ERROR_FILE: str(files.torchrun_error),
            },
            stdin=subprocess.DEVNULL,
            process_group=0,  # a terminal signals the launcher only, which passes on one signal
        )
        ending = self._watch(process, begun, stop)
        return Attempt(
            returncode=process.wait(),
            ending=ending,
            has_begun=len(files.attempts()) > begun,
            error=files.read_torchrun_error(),
        )

    def _watch(
        self, process: "subprocess.Popen[bytes]", begun: int, stop: StopSignals
    ) -> Ending | None:
        """Return when torchrun has ended, and why the launcher ended it, if it did."""
        ending: Ending | None = None
        is_signalled = False
        looked = waiting_since = left_since = time.monotonic()
        while process.poll() is None:
            if stop.is_urgent:
                _kill_with_workers(process)
                return Ending.INTERRUPTED
            now = time.monotonic()
            if now - looked >= _LOOK_S:
                looked = now
                waiting_since = waiting_since if self._waits_for_machines(begun) else now
                left_since = left_since if self._has_lost_workers(process.pid) else now
                ending = ending or self._is_in_vain(now - waiting_since)
            if now - left_since > self._stuck_s:
                process.kill()
                return Ending.STUCK
            # A second signal would end torchrun at once, and leave workers behind.
            if (stop.is_requested or ending) and not is_signalled:
                is_signalled = True
                process.terminate()
            time.sleep(_POLL_S)
        return ending

    def _is_in_vain(self, waiting_s: float) -> Ending | None:
        """Whether torchrun goes on, or waits, where the run is not to go on."""
        if self._files.has_given_up_and_restarted():
            return Ending.GAVE_UP
        if self._rendezvous.is_standalone and self._files.has_stopped_and_restarted():
            return Ending.STOPPED
        return Ending.SPARE if waiting_s > self._spare_s else None

    def _waits_for_machines(self, begun: int) -> bool:
        """Whether torchrun waits for others, though the number of machines is fixed."""
        is_fixed = self._files.entered.exists() and not self._rendezvous.is_elastic
        return is_fixed and len(self._files.attempts()) <= begun

    def _has_lost_workers(self, pid: int) -> bool:
        """Whether the workers have ended with an error, and no others were started."""
        return self._files.has_failed_without_restart() and find_workers(pid) == []


def find_workers(pid: int) -> list[int] | None:
    """Find the running processes that torchrun has started; None where they cannot be listed."""
    with suppress(OSError):
        # Only some kernels list children; where they do, a process that ended meanwhile is gone.
        files = list(Path(f"/proc/{pid}/task").glob("*/children"))
        children = [int(child) for path in files for child in path.read_text().split()]
        if files:
            return [child for child in children if _is_alive(child)]
    with suppress(OSError, subprocess.SubprocessError):
        command = ["ps", "-A", "-o", "pid=", "-o", "ppid=", "-o", "stat="]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=scaled(5.0), check=True
        )
        rows = [line.split() for line in done.stdout.splitlines()]
        return [
            int(row[0])
            for row in rows
            if len(row) == 3 and row[1] == str(pid) and not row[2].startswith("Z")
        ]
    return None


def _is_alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _kill_with_workers(process: "subprocess.Popen[bytes]") -> None:
    """Kill torchrun and its workers at once, each with the processes that it has started."""
    process.send_signal(signal.SIGSTOP)  # it starts no further worker
    for worker in find_workers(process.pid) or []:
        with suppress(OSError):
            os.killpg(worker, signal.SIGKILL)  # torchrun gives each a session of its own
    process.kill()


def _name_of_signal(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def _be_torchrun() -> None:
    """Run torchrun in this process, whose first argument is a file to make when it is imported."""
    from torch.distributed.run import main

    Path(sys.argv.pop(1)).touch()  # the imports may take longer than the wait for machines
    try:
        main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        settle()
        os._exit(1)  # to take torch apart would take a second, and several on a busy machine


if __name__ == "__main__":
    _be_torchrun()
