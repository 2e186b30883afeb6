"""The one place where ranks talk besides gradients, about once a second."""

import time
from dataclasses import dataclass

import torch

from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.state import State
from ddp_sgd.engine.step import StepResult
from ddp_sgd.engine.stopping import StopRequest
from ddp_sgd.engine.timetable import Deadline, Timetable
from ddp_sgd.losses import wide_float
from ddp_sgd.plan import Plan

_PERIOD_S = 1.0
"""How long ranks may go without hearing of each other's wish to stop, as far as steps allow."""


@dataclass(frozen=True, slots=True)
class Beat:
    """What all ranks know after a heartbeat; equal on all of them.

    Args:
        row: Measurements since the last row, by name, where one is due; else None.
        stop: Whether any rank was asked to stop.
        save: Whether the state is to be saved; then there is a row, so that none is half full.
        skipped: Steps without a finite gradient: all, those in a row by now, the longest row.
    """

    row: dict[str, float | None] | None
    stop: bool
    save: bool
    skipped: tuple[int, int, int]


class Heartbeat:
    """Adds up what steps leave behind, on the device, and reads it now and then.

    A beat is due at every row of metrics, at the end of an epoch, and in between about once a
    second. Since every rank must know when, the pause until the next beat follows from step times
    that the last one averaged over ranks.

    Args:
        plan: The run's arithmetic.
        runtime: This process.
        stop: This rank's wish to stop.
        timetable: When the state is saved.
        deadline: When the run must be over.
        every_steps: Steps between rows of metrics.
        state: Where the run begins.
    """

    def __init__(
        self,
        plan: Plan,
        runtime: Runtime,
        stop: StopRequest,
        timetable: Timetable,
        deadline: Deadline,
        *,
        every_steps: int,
        state: State,
    ) -> None:
        self._plan = plan
        self._runtime = runtime
        self._stop = stop
        self._timetable = timetable
        self._deadline = deadline
        self._every_steps = every_steps
        self._tally = _Tally(runtime.device, state.skipped)
        self._next_beat = 0
        self._last_row = state.step
        self._wait_s = 0.0
        self._start = time.perf_counter()

    def after(self, step: int, result: StepResult, *, lr: float, wait_s: float) -> Beat | None:
        """Take note of a step, and beat if it is time.

        Args:
            step: Steps that the run has taken, at least 1.
            result: What the step left behind.
            lr: Rate of the step.
            wait_s: Time that this rank waited for data, in seconds.

        Returns:
            What all ranks know now; None in most steps.
        """
        self._tally.add(result)
        self._wait_s += wait_s
        save = self._timetable.is_due_at(step)
        row_is_due = step % self._every_steps == 0 or step % self._plan.steps_per_epoch == 0
        if not row_is_due and not save and step < self._next_beat:
            return None
        return self._beat(step, result, lr, row_is_due=row_is_due, save=save)

    @property
    def reason(self) -> str | None:
        """Why this rank was asked to stop; None if it was not."""
        return self._stop.reason

    def restart_clock(self) -> None:
        """Leave out the time since the last row, which was spent on something else than steps."""
        self._start = time.perf_counter()
        self._wait_s = 0.0

    def _beat(
        self, step: int, result: StepResult, lr: float, *, row_is_due: bool, save: bool
    ) -> Beat:
        # The wait for the device comes before the look at the clock: steps are not over earlier.
        own_loss, units, own_units, *skipped = self._tally.sums.tolist()
        elapsed_s = time.perf_counter() - self._start
        steps = max(1, step - self._last_row)
        if self._deadline.is_near(max(_PERIOD_S, elapsed_s / steps)):
            self._stop.ask("the deadline is near")
        wishes = [float(self._stop.reason is not None), float(self._timetable.is_due_now())]
        own = [own_loss, *wishes, elapsed_s, self._wait_s]
        shared = sum_over_ranks(self._tally.sums.new_tensor(own), self._runtime)
        loss, stop, save_now, elapsed_s, wait_s = shared.tolist()
        save = save or stop > 0 or save_now > 0
        if save:
            self._timetable.start_over()
        elapsed_s = max(elapsed_s / self._runtime.world_size, 1e-9)
        wait_s /= self._runtime.world_size
        self._next_beat = step + max(1, int(_PERIOD_S * steps / elapsed_s))
        row = None
        if row_is_due or save:
            samples = self._plan.samples_at(step) - self._plan.samples_at(self._last_row)
            row = {
                "train/loss": loss / units if units else None,
                "train/loss_rank0": own_loss / own_units if own_units else None,
                "train/lr": lr,
                "train/grad_norm": result.grad_norm.item(),
                "train/skipped_steps": skipped[0],
                "throughput/samples_per_s": samples / elapsed_s,
                "time/step_ms": 1e3 * elapsed_s / steps,
                "time/data_ms": 1e3 * wait_s / steps,
            }
            self._last_row = step
            self._tally.forget_losses()
            self.restart_clock()
        everything, in_a_row, longest = map(int, skipped)
        return Beat(row, stop > 0, save, (everything, in_a_row, longest))


class _Tally:
    """Sums over steps, in one vector on the device, so that reading them is one wait.

    The entries: loss of this rank, units of all ranks, units of this rank, all since the last row;
    steps of the run that were skipped; those in a row by now; the longest such row.
    """

    def __init__(self, device: torch.device, skipped: tuple[int, int, int]) -> None:
        self.sums = torch.tensor([0, 0, 0, *skipped], dtype=wide_float(device), device=device)
        self._loss, self._units, self._own_units, self._skipped, self._row, self._longest = (
            self.sums
        )

    def add(self, result: StepResult) -> None:
        """Add a step; where it was skipped, its loss and units do not count."""
        counted = 1.0 - result.skipped
        self._loss.add_(torch.where(result.skipped > 0, 0.0, result.loss_total))
        self._units.add_(counted * result.units)
        self._own_units.add_(counted * result.local_units)
        self._skipped.add_(result.skipped)
        self._row.add_(1.0).mul_(result.skipped)
        torch.maximum(self._longest, self._row, out=self._longest)

    def forget_losses(self) -> None:
        """Start the sums of the next row."""
        self.sums[:3] = 0.0
