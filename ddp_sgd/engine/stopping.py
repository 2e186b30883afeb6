"""A wish to stop, made by a signal, granted between steps. No torch: it listens before."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether this process was asked to stop, and by what.

    Attributes:
        reason: Name of the first signal, such as ``SIGTERM``; None as long as there was none.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def ask(self, reason: str) -> None:
        """Ask to stop; the first reason is kept."""
        self.reason = self.reason or reason


def leave_undisturbed() -> None:
    """Let no signal end a process that is about to end by itself, with its own exit code."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_on_signal(
    *signals: signal.Signals,
) -> Iterator[StopRequest]:
    """Turn signals into a request to stop, and restore their handlers at the end.

    A handler only takes a note: no collective, no file, no lock. Outside the main thread Python
    allows no handlers; then the request stays empty unless somebody asks.

    Args:
        signals: Which ones; none means SIGTERM, SIGINT and SIGUSR1.

    Yields:
        The request.
    """
    request = StopRequest()

    def note(number: int, _: FrameType | None) -> None:
        request.ask(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    chosen = signals or (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in chosen}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
