"""CPU affinity and scheduling policy: CPUs that this process may use. No torch."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def batch_scheduling() -> Iterator[None]:
    """Have the threads and processes that are started here wait for a CPU, not interrupt.

    Under the usual policy a thread that wakes up interrupts the one that runs. gloo's thread, woken
    by the other rank, so interrupts the rank in the midst of a call, and spins for a lock that the
    rank holds: with all CPUs in use, steps of two ranks take three times as long. On Linux this
    thread gets the policy that is meant for such work; where it is not as usual it stays.

    Source:
        sched(7), SCHED_BATCH.
    """
    is_changed = _change_policy("SCHED_OTHER", "SCHED_BATCH")
    try:
        yield
    finally:
        if is_changed:
            _change_policy("SCHED_BATCH", "SCHED_OTHER")


def leave_batch_scheduling() -> None:
    """Give this thread the usual policy again: for short turns between waits."""
    _change_policy("SCHED_BATCH", "SCHED_OTHER")


def _change_policy(before: str, after: str) -> bool:
    """Change the policy of this thread, if it is as expected; False where that cannot be done."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # forbidden in a container, or another C library
            if os.sched_getscheduler(0) == getattr(os, before):
                os.sched_setscheduler(0, getattr(os, after), os.sched_param(0))
                return True
    return False
