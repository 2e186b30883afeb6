"""Periodic all-reduce of metrics and of the stop and save flags, about once per second.

Time shares of a run: data, compute, waiting for other ranks, bookkeeping.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ddp_sgd.checkpointing.store import SkippedSteps
from ddp_sgd.distributed.collectives import at_own_rank, sum_over_ranks
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.logged_numbers import logged_names, sum_of_means
from ddp_sgd.engine.step import StepResult
from ddp_sgd.engine.train_state import State
from ddp_sgd.engine.triggers import StopRequest, Timetable
from ddp_sgd.losses import Objective
from ddp_sgd.named_losses import wide_float
from ddp_sgd.plan import Plan

_KINDS = ("data", "compute", "waiting", "bookkeeping")
_KIND_OF = {
    Phase.DATA: "data",
    Phase.BUFFERS: "waiting",
    Phase.FORWARD: "compute",
    Phase.BACKWARD: "compute",
    Phase.OPTIMIZER: "compute",
    Phase.ALL_REDUCE: "waiting",
    Phase.AVERAGE: "waiting",
    Phase.SYNC: "bookkeeping",
    Phase.SAVE: "bookkeeping",
}
"""Phases of training; evaluation is left out."""


def is_share(key: str) -> bool:
    """Whether a key of ``result.json`` comes from ``TimeShares.summary``."""
    return key.startswith("share/") or key == "slowest_rank"


@dataclass(frozen=True, slots=True)
class Spent:
    """Where time went, as a mean over ranks; all in seconds.

    Args:
        by_kind: Time by kind: ``data``, ``compute``, ``waiting`` and ``bookkeeping``.
        waiting_s: Time of each rank in the phase in which ranks wait for each other.
    """

    by_kind: dict[str, float]
    waiting_s: list[float]

    @property
    def elapsed_s(self) -> float:
        """All of it, above 0."""
        return max(sum(self.by_kind.values()), 1e-9)


class TimeShares:
    """Measures where the time goes, by durations of each rank: no two clocks are compared.

    Ranks leave the reduction of a step together. So who comes last waits least there, and has the
    shortest time in that phase: the slowest rank. Where the reduction is a phase of its own, that
    phase is waiting. Where it goes on during the backward pass, waiting is what a rank takes longer
    for that than the quickest one. On an accelerator these are times of the host, which waits for
    the device only at a sync.
    """

    def __init__(
        self, progress: ProgressTracker, runtime: Runtime, meets_in: tuple[str, ...]
    ) -> None:
        self._progress = progress
        self._runtime = runtime
        self._meets_in = meets_in
        self._before = progress.spent_s()
        self._total = Spent(dict.fromkeys(_KINDS, 0.0), [0.0] * runtime.world_size)

    def begin(self) -> None:
        """Leave out the time up to now."""
        self._before = self._progress.spent_s()

    def measure(self) -> list[float]:
        """Return where this rank's time went since the last row, to be summed over ranks."""
        now = self._progress.spent_s()
        kinds = dict.fromkeys(_KINDS, 0.0)
        waiting = 0.0
        for phase, kind in _KIND_OF.items():
            spent = now.get(phase, 0.0) - self._before.get(phase, 0.0)
            # A single rank waits for no other: what a reduction does then is gather gradients.
            kinds["compute" if kind == "waiting" and self._runtime.alone else kind] += spent
            if phase in self._meets_in:
                waiting += spent
        return [*kinds.values(), *at_own_rank(waiting, self._runtime)]

    @staticmethod
    def own_elapsed_s(measured: list[float]) -> float:
        """All the time in what ``measure`` gave."""
        return sum(measured[: len(_KINDS)])

    def read(self, summed: list[float]) -> Spent:
        """Understand the sum over ranks of what ``measure`` gave."""
        kinds = {k: s / self._runtime.world_size for k, s in zip(_KINDS, summed, strict=False)}
        waiting = summed[len(_KINDS) :]
        if Phase.BACKWARD in self._meets_in:
            late = sum(waiting) / len(waiting) - min(waiting)
            kinds["waiting"] += late
            kinds["compute"] -= late
        return Spent(kinds, waiting)

    def close_row(self, spent: Spent) -> None:
        """Add a row to the total of the run, and start the next row."""
        before = self._total
        self._total = Spent(
            {kind: before.by_kind[kind] + spent.by_kind[kind] for kind in _KINDS},
            [a + b for a, b in zip(before.waiting_s, spent.waiting_s, strict=True)],
        )
        self.begin()

    def summary(self) -> dict[str, float | int]:
        """Sum up this attempt of the run.

        Returns:
            ``share/data``, ``share/compute``, ``share/waiting`` and ``share/bookkeeping`` of the
            time in training, each in [0, 1]. On several ranks also ``slowest_rank``, and
            ``share/lag``: the share of time that the others, on average, wait for it.
        """
        total = self._total
        row: dict[str, float | int] = {
            f"share/{kind}": seconds / total.elapsed_s for kind, seconds in total.by_kind.items()
        }
        others = self._runtime.world_size - 1
        if others:
            least = min(total.waiting_s)
            lag = (sum(total.waiting_s) - least) / others - least
            row |= {
                "slowest_rank": total.waiting_s.index(least),
                "share/lag": lag / total.elapsed_s,
            }
        return row


def peak_bytes(device: torch.device) -> int | None:
    """Most memory of a device that training had in use, in bytes; None if not CUDA."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


_PERIOD_S = 1.0
"""How long ranks may go without hearing of each other's stop request, as far as steps allow."""

_MOST_STEPS = 1000
"""Most steps between two syncs: what steps leave behind is kept until then."""


@dataclass(frozen=True, slots=True)
class SyncResult:
    """What all ranks know after a sync; equal on all of them.

    Args:
        row: Measurements since the last row, by name, where one is due; else None.
        stop: Whether any rank has a stop request.
        save: Whether the state is to be saved; then there is a row, so that none is half full.
        skipped: Steps without a finite gradient.
    """

    row: dict[str, float | None] | None
    stop: bool
    save: bool
    skipped: SkippedSteps


class RankSync:
    """Keeps what steps leave behind, on the device, and reads it now and then, in one transfer.

    A sync is due at every row of metrics, at the end of an epoch, and in between about once per
    second. Since every rank must know when, the pause until the next sync follows from step times
    that the last one averaged over ranks.

    Args:
        plan: The run's arithmetic.
        runtime: This process.
        stop: This rank's stop request.
        timetable: When rows are written, the state is saved, and the run must be over.
        shares: Where the time goes.
        state: Where the run begins.
        objective: What is minimized, of which other numbers may be logged; None: there are none.
    """

    def __init__(
        self,
        plan: Plan,
        runtime: Runtime,
        stop: StopRequest,
        timetable: Timetable,
        shares: TimeShares,
        state: State,
        objective: Objective | None = None,
    ) -> None:
        self._names = logged_names(objective) if objective else ()
        self._sums_means = bool(objective and objective.form.sums_means)
        self._plan = plan
        self._runtime = runtime
        self._stop = stop
        self._timetable = timetable
        self._shares = shares
        self._tally = _Tally(state.skipped)
        self._next_sync = self._next_look = 0
        self._last_row = state.step
        if runtime.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(runtime.device)  # of what ran in this process before

    def after(self, step: int, result: StepResult, *, lr: float) -> SyncResult | None:
        """Count a step, and synchronize the ranks if it is time.

        Args:
            step: Steps that the run has taken, at least 1.
            result: What the step left behind.
            lr: Rate of the step.

        Returns:
            What all ranks know now; None in most steps.
        """
        self._tally.unread.append(result)
        if step < self._next_look or not self._plan.ranks_sync_at(step):
            return None  # between averages, what could be saved or stopped differs between ranks
        save = self._timetable.save_is_due_at(step)
        row_is_due = self._timetable.row_is_due_at(step, self._last_row)
        is_due = row_is_due or save or step >= self._next_sync
        synced = self._sync(step, lr, row_is_due=row_is_due, save=save) if is_due else None
        self._next_look = min(self._next_sync, self._timetable.next_date(step))
        return synced

    @property
    def reason(self) -> str | None:
        """Reason of this rank's stop request; None if there is none."""
        return self._stop.reason

    def _sync(self, step: int, lr: float, *, row_is_due: bool, save: bool) -> SyncResult:
        # The wait for the device comes before the look at the clock: steps are not over earlier.
        self._tally.read()
        own, device = self._shares.measure(), self._runtime.device
        steps = max(1, step - self._last_row)
        elapsed_s = self._shares.own_elapsed_s(own)
        if self._timetable.deadline.is_near(max(_PERIOD_S, elapsed_s / steps)):
            self._stop.ask("the deadline is near")
        wishes = [float(self._stop.reason is not None), float(self._timetable.save_is_due_now())]
        peak = peak_bytes(device)
        peaks = [] if peak is None else at_own_rank(peak, self._runtime)
        numbers = self._tally.numbers or [0.0] * (2 * len(self._names))
        everything = torch.tensor(
            [self._tally.loss, *wishes, *peaks, *numbers, *own],
            dtype=wide_float(device),
            device=device,
        )
        loss, stop, save_now, *summed = sum_over_ranks(everything, self._runtime).tolist()
        peaks, summed = summed[: len(peaks)], summed[len(peaks) :]
        means, times = self._means(summed), summed[2 * len(self._names) :]
        spent = self._shares.read(times)
        save = save or stop > 0 or save_now > 0
        if save:
            self._timetable.start_over()
        pause = int(_PERIOD_S * steps / spent.elapsed_s)
        self._next_sync = step + min(max(1, pause), _MOST_STEPS)
        row = self._row(step, lr, loss, means, spent) if row_is_due or save else None
        if row is not None and peaks:
            row["memory/peak_bytes"] = max(peaks)
        return SyncResult(row, stop > 0, save, self._tally.skipped)

    def _means(self, numbers: list[float]) -> dict[str, float | None]:
        """Divide the sums of what is logged beside the loss by their units."""
        count = len(self._names)
        pairs = zip(numbers[:count], numbers[count : 2 * count], strict=True)
        means = (total / units if units else None for total, units in pairs)
        return dict(zip(self._names, means, strict=True))

    def _losses(self, loss: float, means: Mapping[str, float | None]) -> dict[str, float | None]:
        """Give the mean losses of all ranks and of this one."""
        tally = self._tally
        if not self._sums_means:
            return {
                "train/loss": loss / tally.units if tally.units else None,
                "train/loss_rank0": tally.loss / tally.own_units if tally.own_units else None,
            }
        own = self._means(tally.numbers) if tally.numbers else {}
        return {"train/loss": sum_of_means(means), "train/loss_rank0": sum_of_means(own)}

    def _row(
        self, step: int, lr: float, loss: float, means: Mapping[str, float | None], spent: Spent
    ) -> dict[str, float | None]:
        tally, steps = self._tally, max(1, step - self._last_row)
        samples = self._plan.samples_at(step) - self._plan.samples_at(self._last_row)
        step_ms = {kind: 1e3 * seconds / steps for kind, seconds in spent.by_kind.items()}
        row: dict[str, float | None] = {
            **self._losses(loss, means),
            **{f"train/{name}": mean for name, mean in means.items()},
            "train/lr": lr,
            "train/grad_norm": tally.grad_norm,
            "train/skipped_steps": float(tally.skipped.total),
            **tally.scaling,
            "throughput/samples_per_s": samples / spent.elapsed_s,
            "time/step_ms": 1e3 * spent.elapsed_s / steps,
            "time/data_ms": step_ms["data"],
            "time/compute_ms": step_ms["compute"],
            "time/waiting_ms": step_ms["waiting"],
            "time/bookkeeping_ms": step_ms["bookkeeping"],
        }
        self._last_row = step
        self._shares.close_row(spent)
        tally.forget_losses()
        return row


class _Tally:
    """Sums over steps.

    Attributes:
        unread: What steps left behind on the device since the last reading.
        loss: Loss of this rank, summed over its units since the last row.
        units: Units of all ranks since the last row.
        own_units: Units of this rank since the last row.
        numbers: Sums and units of this rank of what is logged beside the loss, since the last row;
            empty if there was nothing.
        grad_norm: L2 norm of the last gradient.
        skipped: Steps of the run that were skipped; without overflows, which the loss scale needs.
        scaling: ``train/loss_scale`` and ``train/overflow_steps`` of the last step; empty without a
            loss scale.
    """

    def __init__(self, skipped: SkippedSteps) -> None:
        self.unread: list[StepResult] = []
        self.skipped = skipped
        self.grad_norm = 0.0
        self.scaling: dict[str, float] = {}
        self.forget_losses()

    def forget_losses(self) -> None:
        """Start the sums of the next row."""
        self.loss = self.units = self.own_units = 0.0
        self.numbers: list[float] = []

    def read(self) -> None:
        """Wait for the device, once, and add the steps up; what was skipped has no loss."""
        tensors = [tensor for result in self.unread for tensor in result.tensors()]
        numbers = iter(torch.stack(tensors).tolist() if tensors else ())
        for result in self.unread:
            losses = [next(numbers) for _ in result.losses]
            units = next(numbers) if isinstance(result.units, torch.Tensor) else result.units
            own = result.local_units
            own = next(numbers) if isinstance(own, torch.Tensor) else own
            self.grad_norm = next(numbers)
            is_finite = math.isfinite(self.grad_norm)
            scale = 1.0
            if result.scaling:
                scale, overflows = next(numbers), next(numbers)
                self.scaling = {"train/loss_scale": scale, "train/overflow_steps": overflows}
            logged = [next(numbers) for _ in result.numbers]
            if is_finite or scale <= 1.0:
                self.skipped = self.skipped.after(is_finite=is_finite)
            if is_finite:
                pairs = zip(result.weights, losses, strict=True)
                self.loss += sum([weight * loss for weight, loss in pairs if weight])  # no dummy
                self.units += units
                self.own_units += own
                before = self.numbers or [0.0] * len(logged)
                self.numbers = [a + b for a, b in zip(before, logged, strict=True)]
        self.unread.clear()
