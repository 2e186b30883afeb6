"""The one place where ranks talk besides gradients, about once a second."""

import time
from dataclasses import dataclass

import torch

from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.step import StepResult
from ddp_sgd.engine.stopping import StopRequest
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
        skipped_steps: Steps of the run that were skipped, since their gradient was not finite.
        skipped_in_a_row: The longest row of such steps so far.
    """

    row: dict[str, float | None] | None
    stop: bool
    skipped_steps: int
    skipped_in_a_row: int


class Heartbeat:
    """Adds up what steps leave behind, on the device, and reads it now and then.

    A beat is due at every row of metrics, at the end of an epoch, and in between about once a
    second. Since every rank must know when, the pause until the next beat follows from step times
    that the last one averaged over ranks.

    Args:
        plan: The run's arithmetic.
        runtime: This process.
        stop: This rank's wish to stop.
        every_steps: Steps between rows of metrics.
    """

    def __init__(
        self, plan: Plan, runtime: Runtime, stop: StopRequest, *, every_steps: int
    ) -> None:
        self._plan = plan
        self._runtime = runtime
        self._stop = stop
        self._every_steps = every_steps
        self._tally = _Tally(runtime.device)
        self._next_beat = 0
        self._last_row = 0
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
        row_is_due = step % self._every_steps == 0 or step % self._plan.steps_per_epoch == 0
        if not row_is_due and step < self._next_beat:
            return None
        return self._beat(step, result, lr, row_is_due=row_is_due)

    def restart_clock(self) -> None:
        """Leave out the time since the last row, which was spent on something else than steps."""
        self._start = time.perf_counter()
        self._wait_s = 0.0

    def _beat(self, step: int, result: StepResult, lr: float, *, row_is_due: bool) -> Beat:
        # The wait for the device comes before the look at the clock: steps are not over earlier.
        own_loss, units, own_units, skipped, _, longest = self._tally.sums.tolist()
        elapsed_s = time.perf_counter() - self._start
        own = [own_loss, float(self._stop.reason is not None), elapsed_s, self._wait_s]
        shared = sum_over_ranks(self._tally.sums.new_tensor(own), self._runtime)
        loss, stop, elapsed_s, wait_s = shared.tolist()
        elapsed_s = max(elapsed_s / self._runtime.world_size, 1e-9)
        wait_s /= self._runtime.world_size
        steps = max(1, step - self._last_row)
        self._next_beat = step + max(1, int(_PERIOD_S * steps / elapsed_s))
        row = None
        if row_is_due:
            samples = self._plan.samples_at(step) - self._plan.samples_at(self._last_row)
            row = {
                "train/loss": loss / units if units else None,
                "train/loss_rank0": own_loss / own_units if own_units else None,
                "train/lr": lr,
                "train/grad_norm": result.grad_norm.item(),
                "train/skipped_steps": skipped,
                "throughput/samples_per_s": samples / elapsed_s,
                "time/step_ms": 1e3 * elapsed_s / steps,
                "time/data_ms": 1e3 * wait_s / steps,
            }
            self._last_row = step
            self._tally.forget_losses()
            self.restart_clock()
        return Beat(row, stop > 0, int(skipped), int(longest))


class _Tally:
    """Sums over steps, in one vector on the device, so that reading them is one wait.

    The entries: loss of this rank, units of all ranks, units of this rank, all since the last row;
    steps of the run that were skipped; those in a row by now; the longest such row.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(6, dtype=wide_float(device), device=device)
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
