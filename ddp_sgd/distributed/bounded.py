"""Calls that end in time, whatever the one who is called does."""

import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeVar, cast

T = TypeVar("T")


def call_within(limit_s: float, work: Callable[[], T]) -> T:
    """Return what the work returns, or raise what it raises, unless it takes too long.

    torch's client of a store may wait for ever for a host that is silent, whatever its timeout.

    Args:
        limit_s: Longest wait, in seconds; work that takes longer is left to itself.
        work: Called in a thread.

    Raises:
        TimeoutError: The work is not done.
    """
    answers: SimpleQueue[tuple[object, Exception | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except Exception as error:  # the caller's to handle
            answers.put((None, error))

    threading.Thread(target=run, name="ddp_sgd-bounded", daemon=True).start()
    try:
        value, error = answers.get(timeout=limit_s)
    except Empty:
        raise TimeoutError("there is no answer") from None
    if error:
        raise error
    return cast("T", value)


def run_within(limit_s: float, work: Callable[[], object]) -> None:
    """Do some work as far as it goes; an error is dropped, and work that takes too long left alone.

    Args:
        limit_s: Longest wait, in seconds.
        work: Called in a thread.
    """
    with suppress(Exception):
        call_within(limit_s, work)
