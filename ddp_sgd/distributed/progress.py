"""Progress tracker of the training thread: its phase, and the time spent in each."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping


class ProgressTracker:
    """Where the training thread is; that thread alone writes, others look on, without a lock.

    Args:
        clock: Gives the time in seconds.

    Attributes:
        step: Step of the run.
        phase: What is being done, such as ``reading data``.
        count: Phases entered: comparable, since all ranks enter the same phases in the same order.
        ticks: Signs of life, phases included.
    """

    __slots__ = ("_clock", "_since", "_spent_s", "count", "phase", "step", "ticks")

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.step = 0
        self.phase = "start"
        self.count = 0
        self.ticks = 0
        self._clock = clock
        self._since = clock()
        self._spent_s: defaultdict[str, float] = defaultdict(float)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Enter a phase that every rank enters, in the same order.

        Args:
            phase: Its name, for people.
            step: Step of the run; None keeps the one before.
        """
        now = self._clock()
        self._spent_s[self.phase] += now - self._since
        self._since = now
        if step is not None:
            self.step = step
        self.phase = phase
        self.count += 1
        self.ticks += 1

    def touch(self) -> None:
        """Show life within a phase; ranks may do so unequally often."""
        self.ticks += 1

    def spent_s(self) -> Mapping[str, float]:
        """Tell how long this thread was in each phase up to now, in seconds."""
        spent = self._spent_s.copy()
        spent[self.phase] += self._clock() - self._since
        return spent
