"""Calls with a timeout, in a thread that is abandoned when it is over."""

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import NoReturn, TypeVar, cast

from ddp_sgd.console import settle

T = TypeVar("T")


def call_with_timeout(limit_s: float, work: Callable[[], T]) -> T:
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


def run_with_timeout(limit_s: float, work: Callable[[], object]) -> None:
    """Do some work as far as it goes; an error is dropped, and work that takes too long left alone.

    Args:
        limit_s: Longest wait, in seconds.
        work: Called in a thread.
    """
    with suppress(Exception):
        call_with_timeout(limit_s, work)


def leave(code: int) -> NoReturn:
    """Exit with a code, whatever threads of this package are still in a call.

    The interpreter ends a daemon thread that comes back from C++ by unwinding its stack, which
    aborts the process: exit code -6 in place of the run's. Where there is such a thread, exit hooks
    are left out.

    Args:
        code: Exit code of the contract.
    """
    if any(
        thread.daemon and thread.name.startswith("ddp_sgd-") for thread in threading.enumerate()
    ):
        settle()
        os._exit(code)
    sys.exit(code)
