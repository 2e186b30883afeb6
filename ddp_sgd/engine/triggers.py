"""Graceful shutdown: a signal stops a run at once before its first step, and later between steps.

Before the first step a handler raises ``StopInterrupt`` in the main thread. From ``defer`` on it
sets a flag, which is read between steps. No torch: it listens before.

Triggers: when to log a row, when to save, and the deadline of the run.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from types import FrameType
from typing import Protocol

from ddp_sgd.config.sections import CheckpointConfig, EvalConfig
from ddp_sgd.console import report_error
from ddp_sgd.distributed.environment import end_of_job
from ddp_sgd.distributed.process_exit import leave_for_launcher
from ddp_sgd.errors import ExitCode, StopInterrupt, StoppedError
from ddp_sgd.host import scaled
from ddp_sgd.plan import Plan

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_INTERRUPTED = 128 + signal.SIGINT
"""Exit code of a process that a second Ctrl-C ends: what a shell gives for a death by SIGINT."""
_GRACE_S = scaled(1.5)
"""Time for the main thread to raise after a signal: it may be in a call of a C library."""


class HasReason(Protocol):
    """What a user's own stop object needs: a ``reason``, None as long as the run is to go on."""

    @property
    def reason(self) -> str | None:
        """Why the run is to stop."""


class StopRequest:
    """Stop request of this process, and its reason.

    Args:
        other: Another source of requests, such as the stop object of a user.

    Attributes:
        interrupt: What the handler has raised, once it has.
        force: Ends this process where the main thread does not, given the error to end with; called
            in another thread.
    """

    def __init__(self, other: HasReason | None = None) -> None:
        self.interrupt: StopInterrupt | None = None
        self.force: Callable[[StoppedError], None] | None = None
        self._reason: str | None = None
        self._other = other
        self._is_deferred = self._is_held = False

    @property
    def reason(self) -> str | None:
        """Source of the first request, such as ``SIGTERM``; None as long as there is none."""
        return self._reason or (self._other.reason if self._other else None)

    def ask(self, reason: str) -> None:
        """Request a stop between two steps; the first reason is kept."""
        self._reason = self._reason or reason

    def defer(self) -> None:
        """From here on a signal is honoured between steps, where ``reason`` is read.

        Raises:
            StopInterrupt: There was a signal before, and what it raised was caught.
        """
        self._is_deferred = True
        if self.interrupt and not self.interrupt.is_caught:
            raise self.interrupt

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Let a signal raise at the end of the block, or end the process if that takes too long.

        An exception that comes up in C++ code which expects none, as in the import of torch, would
        abort the process.

        Raises:
            StopInterrupt: There was a signal.
        """
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._reason is not None:
            self._raise(self._reason)

    def ask_now(self, reason: str) -> None:
        """Request a stop at once, as a handler does in the main thread.

        Raises:
            StopInterrupt: The run has not come to its first step, and this is the first request.
        """
        is_first = self._reason is None
        self.ask(reason)
        if is_first and not self._is_held:
            self._raise(reason)

    def _raise(self, reason: str) -> None:
        if not self._is_deferred:
            self.interrupt = StopInterrupt(reason)
            raise self.interrupt

    def is_unanswered(self) -> bool:
        """Whether a signal came before the first step, and the main thread goes on regardless."""
        caught = self.interrupt is not None and self.interrupt.is_caught
        return not self._is_deferred and not caught


def leave_undisturbed() -> None:
    """Let no signal end a process that is about to end by itself, with its own exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_on_signal(*signals: signal.Signals, owns_process: bool = False) -> Iterator[StopRequest]:
    """Turn signals into a request to stop, and restore their handlers at the end.

    The first signal raises before ``defer``, and is a flag from then on. A second SIGINT ends the
    process at once if it is ours, and raises KeyboardInterrupt if it is the user's. A handler does
    nothing else: no collective, no file, no lock. Outside the main thread Python allows no
    handlers; then the request stays empty unless ``ask`` is called.

    Args:
        signals: Which ones; none means SIGTERM, SIGINT and SIGUSR1.
        owns_process: Whether the process is there for this run alone. Then it ends soon, even if
            the main thread is in a call that does not come back.

    Yields:
        The request.

    Raises:
        StoppedError: A signal came before ``defer``.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    interrupts = 0

    def note(number: int, _: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if number == signal.SIGINT and interrupts > 1:
            if owns_process:
                os._exit(_INTERRUPTED)
            raise KeyboardInterrupt
        request.ask_now(signal.Signals(number).name)

    before = {number: signal.signal(number, note) for number in signals or SIGNALS}
    try:
        if owns_process:
            with _watch_signals(request, before):
                yield request
        else:
            yield request
    except StopInterrupt as interrupt:
        raise interrupt.as_error() from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _watch_signals(request: StopRequest, signals: Iterable[int]) -> Iterator[None]:
    """Receive signals in a thread as well: a handler waits for what the main thread has called."""
    global _is_watching  # noqa: PLW0603
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    _is_watching = True
    over = threading.Event()
    thread = threading.Thread(
        target=_read_signals,
        args=(read_end, request, set(signals), over),
        name="ddp_sgd-signals",
        daemon=True,
    )
    thread.start()
    try:
        yield
    finally:
        over.set()
        _is_watching = False
        signal.set_wakeup_fd(before)
        os.close(write_end)  # which ends the thread
        thread.join()
        os.close(read_end)


def _leave_pipe_to_parent() -> None:
    """Reset the wakeup descriptor in a loader process that is forked: the pipe is its parent's."""
    if _is_watching:
        signal.set_wakeup_fd(-1)


_is_watching = False
os.register_at_fork(after_in_child=_leave_pipe_to_parent)


def _read_signals(
    read_end: int, request: StopRequest, signals: set[int], over: threading.Event
) -> None:
    """Read the numbers of signals, and end the process where the main thread does not."""
    interrupts, first = 0, True
    while numbers := os.read(read_end, 64):
        interrupts += numbers.count(signal.SIGINT)
        if interrupts > 1:
            os._exit(_INTERRUPTED)
        if first and request.is_unanswered() and not signals.isdisjoint(numbers):
            first = False
            name = next(signal.Signals(n).name for n in numbers if n in signals)
            threading.Thread(target=_end, args=(request, name, over), daemon=True).start()


def _end(request: StopRequest, name: str, over: threading.Event) -> None:
    """End the process if the main thread has not begun to do so after a while."""
    if over.wait(_GRACE_S) or not request.is_unanswered():
        return
    error = StopInterrupt(name).as_error()
    try:
        if request.force:
            request.force(error)
        else:
            report_error(error)
            leave_for_launcher(ExitCode.STOPPED, str(error))
    finally:
        os._exit(ExitCode.STOPPED)


_LEAVING_S = 3.0
"""Time from the last save to the end of the process: reports are closed, ranks part."""


class Timetable:
    """When a row of metrics is written, when the model is scored, and when the state is saved.

    Args:
        config: Section ``checkpoint`` of the configuration.
        plan: The run's arithmetic.
        row_steps: Steps between rows, at least 1.
        score: Section ``eval`` of the configuration; None: its defaults.
        deadline: When the run must be over; None: never.

    Attributes:
        deadline: The same.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        plan: Plan,
        *,
        row_steps: int,
        score: EvalConfig | None = None,
        deadline: "Deadline | None" = None,
    ) -> None:
        self.deadline = deadline or Deadline(None)
        self._config = config
        self._plan = plan
        self._row_steps = row_steps
        self._score = score or EvalConfig()
        self._last_save = time.monotonic()

    def row_is_due_at(self, step: int, last_row: int) -> bool:
        """Whether a row is written after this many steps, as at the end of every epoch.

        Args:
            step: Steps that the run has taken.
            last_row: Step of the row before.
        """
        passed = step // self._row_steps > last_row // self._row_steps
        return passed or self._plan.ends_epochs(step, 1)

    def score_is_due_at(self, step: int) -> bool:
        """Whether the model is scored after this many steps, as at the end of the run."""
        score = self._score
        auto = None if score.every_steps else 1
        epochs = auto if score.every_epochs == "auto" else score.every_epochs
        return (
            step == self._plan.total_steps
            or self._score_is_due_by_steps(step)
            or (epochs is not None and self._plan.ends_epochs(step, epochs))
        )

    def _score_is_due_by_steps(self, step: int) -> bool:
        steps = self._score.every_steps
        return steps is not None and step % steps == 0

    def save_is_due_at(self, step: int) -> bool:
        """Whether the plan has a save after this many steps; known to all ranks beforehand."""
        steps, epochs = self._config.every_steps, self._config.every_epochs
        return (
            step == self._plan.total_steps
            or (steps is not None and step % steps == 0)
            or (epochs is not None and self._plan.ends_epochs(step, epochs))
            or (epochs is not None and self._score_is_due_by_steps(step))  # it may be the best
        )

    def next_date(self, step: int) -> int:
        """First step after this one at which a row or a save may be due by the plan."""
        periods = (
            *(self._row_steps, self._plan.steps_per_epoch),
            *(self._config.every_steps, self._score.every_steps),
        )
        dates = [step - step % period + period for period in periods if period is not None]
        return min(*dates, max(self._plan.total_steps, step + 1))

    def save_is_due_now(self) -> bool:
        """Whether a save is due by the clock of this rank; the ranks must agree on it."""
        minutes = self._config.every_minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def start_over(self) -> None:
        """Start the clock again, after a save."""
        self._last_save = time.monotonic()


class Deadline:
    """When the run must be over; it stops while there is time to save.

    Args:
        at: Unix time in seconds; None if there is none.

    Attributes:
        save_s: How long a save takes by now, in seconds.
        score_s: How long an evaluation took, in seconds.
    """

    def __init__(self, at: float | None) -> None:
        self._at = at
        self.save_s = 0.0
        self.score_s = 0.0

    def is_near(self, pause_s: float) -> bool:
        """Whether to stop now.

        Args:
            pause_s: Time until the next call, in seconds, evaluations not counted.
        """
        if self._at is None:
            return False
        # Twice: what was measured once may take longer the next time.
        needed_s = 2.0 * (pause_s + self.score_s + self.save_s) + _LEAVING_S
        return time.time() + needed_s >= self._at


def read_deadline(given: float | str | None, environ: Mapping[str, str]) -> float | None:
    """Find out when the run must be over.

    Args:
        given: ``runtime.deadline``: unix time in seconds, or a date and time.
        environ: The environment; SLURM sets the end of the job there, or the job to query.

    Returns:
        Unix time in seconds; None if not known.
    """
    if isinstance(given, str):
        return datetime.fromisoformat(given).astimezone().timestamp()
    if given is not None:
        return given
    return end_of_job(environ)
