"""Triggers: when to log a row, when to save, and the deadline of the run."""

import time
from collections.abc import Mapping
from datetime import datetime

from ddp_sgd.config.sections import CheckpointConfig
from ddp_sgd.plan import Plan
from ddp_sgd.slurm import end_of_job

_LEAVING_S = 3.0
"""Time from the last save to the end of the process: reports are closed, ranks part."""


class Timetable:
    """When a row of metrics is written, and when the state is saved.

    Args:
        config: Section ``checkpoint`` of the configuration.
        plan: The run's arithmetic.
        row_steps: Steps between rows, at least 1.
    """

    def __init__(self, config: CheckpointConfig, plan: Plan, *, row_steps: int) -> None:
        self._config = config
        self._plan = plan
        self._row_steps = row_steps
        self._last_save = time.monotonic()

    def row_is_due_at(self, step: int, last_row: int) -> bool:
        """Whether a row is written after this many steps, as at the end of every epoch.

        Args:
            step: Steps that the run has taken.
            last_row: Step of the row before.
        """
        passed = step // self._row_steps > last_row // self._row_steps
        return passed or step % self._plan.steps_per_epoch == 0

    def save_is_due_at(self, step: int) -> bool:
        """Whether the plan asks for a save after this many steps; known to all ranks beforehand."""
        steps, epochs = self._config.every_steps, self._config.every_epochs
        return (
            step == self._plan.total_steps
            or (steps is not None and step % steps == 0)
            or (epochs is not None and self._plan.ends_epochs(step, epochs))
        )

    def next_date(self, step: int) -> int:
        """First step after this one at which a row or a save may be due by the plan."""
        periods = (self._row_steps, self._plan.steps_per_epoch, self._config.every_steps)
        dates = [step - step % period + period for period in periods if period is not None]
        return min(dates)

    def save_is_due_now(self) -> bool:
        """Whether the clock of this rank asks for a save; the ranks must agree on the answer."""
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
            pause_s: Time until this is asked again, in seconds, evaluations not counted.
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
        environ: The environment; SLURM says there when the job ends, or which job to ask it for.

    Returns:
        Unix time in seconds; None if nobody says.
    """
    if isinstance(given, str):
        return datetime.fromisoformat(given).astimezone().timestamp()
    if given is not None:
        return given
    return end_of_job(environ)
