"""The CPUs of this machine: how many this process may use, and how it shares them. No torch."""

import os
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
    if not hasattr(os, "sched_setscheduler") or os.sched_getscheduler(0) != os.SCHED_OTHER:
        yield
        return
    with suppress(OSError):  # a container may forbid it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
