"""Progress tracker of the training thread: its phase, and the time spent in each.

Hang report: which ranks hang, by two readings of all notes, and the line for the user.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple


class Phase(StrEnum):
    """Phases of the training thread; the values are those of messages and stacks."""

    START = "start"
    DATA = "reading data"
    FORWARD = "forward pass"
    BACKWARD = "backward pass"
    ALL_REDUCE = "reducing gradients"
    OPTIMIZER = "moving weights"
    AVERAGE = "averaging weights"
    BUFFERS = "synchronizing buffers"
    SYNC = "sync"
    SAVE = "saving"
    EVALUATE = "evaluating"


class ProgressTracker:
    """Where the training thread is; that thread alone writes, others look on, without a lock.

    Args:
        clock: Gives the time in seconds.

    Attributes:
        step: Step of the run.
        phase: What is being done.
        count: Phases entered: comparable, since all ranks enter the same phases in the same order.
        ticks: Signs of progress, phases included.
    """

    __slots__ = ("_clock", "_since", "_spent_s", "count", "phase", "step", "ticks")

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.step = 0
        self.phase = Phase.START
        self.count = 0
        self.ticks = 0
        self._clock = clock
        self._since = clock()
        self._spent_s: defaultdict[Phase, float] = defaultdict(float)

    def enter(self, phase: Phase, step: int | None = None) -> None:
        """Enter a phase that every rank enters, in the same order.

        Args:
            phase: The phase.
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
        """Show progress within a phase; ranks may do so unequally often."""
        self.ticks += 1

    def spent_s(self) -> Mapping[Phase, float]:
        """Return how long this thread was in each phase up to now, in seconds."""
        spent = self._spent_s.copy()
        spent[self.phase] += self._clock() - self._since
        return spent


Place = tuple[str, int]
"""Host and process id of a rank."""

NOTE_S = 2.0
"""Longest time between two notes of a rank that keeps a watch, in seconds."""


class Note(NamedTuple):
    """Progress of a rank, as the others read it.

    Args:
        step: Step of the run.
        phase: What the training thread does.
        phases: Phases that it has entered; comparable among ranks.
        idle_s: Time since its last progress, in seconds, as far as polls saw it pass.
        polls: Polls of the watch; stands still only if the whole process does.
        left: Whether the rank needs the store no more.
    """

    step: int
    phase: str
    phases: int
    idle_s: float
    polls: int
    left: bool = False


class HangReport(NamedTuple):
    """Who hangs.

    Args:
        message: The line for the user.
        reporter: The rank that prints it.
        hung_ranks: The ranks that hang.
    """

    message: str
    reporter: int
    hung_ranks: list[int]


def find_hung_ranks(
    before: Sequence[Note] | None, after: Sequence[Note], limit_s: float
) -> tuple[list[int], bool]:
    """Find the ranks that the others wait for.

    Args:
        before: A reading of the notes of all ranks, many polls ago; None if there is none.
        after: The reading of now.
        limit_s: Time without progress after which a rank hangs, in seconds.

    Returns:
        The ranks, none where those that lag do make progress; and whether they are frozen, that
        is not even their watch runs.
    """
    here = [rank for rank, note in enumerate(after) if not note.left]
    frozen = [rank for rank in here if before and after[rank].polls == before[rank].polls]
    if frozen:
        return frozen, True
    least = min((after[rank].phases for rank in here), default=0)
    last = [rank for rank in here if after[rank].phases == least]
    return (last if all(after[rank].idle_s >= limit_s for rank in last) else []), False


def describe_hang(
    hung_ranks: Sequence[int],
    notes: Sequence[Note],
    places: Sequence[Place],
    *,
    frozen: bool,
    hang_s: float,
    stacks: Path | None,
) -> str:
    """Describe which ranks hang, since when, where, and what to do, on one line."""
    first = notes[hung_ranks[0]]
    hosts = sorted({places[rank][0] for rank in hung_ranks})
    many = len(hung_ranks) > 1
    who = f"rank{'s' * many} {_join(hung_ranks)} of {len(notes)} on host{'s' * (len(hosts) > 1)}"
    what = "frozen, with no sign of life" if frozen else "stuck, with no progress"
    files = "stack-rank-*.txt" if many else f"stack-rank-{hung_ranks[0]}.txt"
    look = f"look at {files} in {stacks}" if stacks else "look at what was done there"
    return (
        f"{who} {_join(hosts)} {'are' if many else 'is'} {what} for {hang_s:g} s in phase "
        f'"{first.phase}" of step {first.step}; {look}, and raise runtime.hang_s if a phase may '
        "take that long."
    )


def _join(names: Sequence[object]) -> str:
    shown = [str(name) for name in names[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
