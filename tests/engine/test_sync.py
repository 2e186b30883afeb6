import math
import time

import pytest
import torch
from ranks import run_ranks

from ddp_sgd.checkpointing.store import SkippedSteps
from ddp_sgd.config import RunConfig
from ddp_sgd.distributed import collectives
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import sync as module
from ddp_sgd.engine.step import StepResult
from ddp_sgd.engine.sync import RankSync, TimeShares
from ddp_sgd.engine.train_state import State
from ddp_sgd.engine.triggers import Deadline, StopRequest, Timetable
from ddp_sgd.plan import make_plan


class Day:
    """A sync with a clock that the test moves, in phases that the test names."""

    def __init__(
        self, runtime=None, *, every_steps=10, samples=300, stop=None, state=None, deadline=None,
        **changes,
    ):  # fmt: skip
        runtime = runtime or Runtime()
        described = {"data": {"batch_size": 3}, "epochs": 100, "checkpoint": {"every_epochs": None}}
        config = RunConfig(**described | changes)
        plan = make_plan(config, samples=samples, world_size=runtime.world_size)
        self.now = 100.0
        self.progress = ProgressTracker(lambda: self.now)
        self.rank_sync = RankSync(
            plan,
            runtime,
            stop or StopRequest(),
            Timetable(config.checkpoint, plan, row_steps=every_steps, deadline=Deadline(deadline)),
            TimeShares(self.progress, runtime, ()),
            state or State(),
        )

    def spend(self, seconds, phase=Phase.FORWARD):
        self.progress.enter(phase)
        self.now += seconds

    def after(self, step, result, seconds=1.0):
        self.spend(seconds)
        return self.rank_sync.after(step, result, lr=0.1)


def result(loss=6.0, units=3, own=3, norm=2.0):
    """What a step leaves behind whose only micro-batch has this loss in all."""
    return StepResult([torch.tensor(loss / own)], [own], units, own, torch.tensor(norm))


BAD = {"loss": math.nan, "norm": math.nan}


def test_a_row_every_so_many_steps_and_at_the_end_of_an_epoch():
    rows_at = {}
    day = Day(every_steps=7, samples=30)  # ten steps per epoch
    for step in range(1, 31):
        day.spend(0.1, Phase.DATA)
        if synced := day.after(step, result(), 0.4):
            rows_at[step] = synced
    assert [step for step, synced in rows_at.items() if synced.row] == [7, 10, 14, 20, 21, 28, 30]
    assert rows_at[30].row == {
        "train/loss": 2.0,
        "train/loss_rank0": 2.0,
        "train/lr": 0.1,
        "train/grad_norm": 2.0,
        "train/skipped_steps": 0.0,
        "throughput/samples_per_s": pytest.approx(6.0),
        "time/step_ms": pytest.approx(500.0),
        "time/data_ms": pytest.approx(100.0),
        "time/compute_ms": pytest.approx(400.0),
        "time/waiting_ms": 0.0,
        "time/bookkeeping_ms": 0.0,
    }


@pytest.mark.parametrize(("step_s", "expected"), [(0.25, [1, 5, 9, 13]), (4.0, list(range(1, 16)))])
def test_ranks_talk_about_once_a_second(step_s, expected):
    day = Day(every_steps=1000, samples=3000)
    heard = [step for step in range(1, 16) if day.after(step, result(), step_s)]
    assert heard == expected


def test_never_every_step(monkeypatch):
    calls = []

    def count(tensor, runtime):
        calls.append(tensor)
        return collectives.sum_over_ranks(tensor, runtime)

    monkeypatch.setattr(module, "sum_over_ranks", count)
    day = Day(every_steps=50)
    for step in range(1, 101):
        day.after(step, result(), 0.001)
    assert len(calls) == 3  # the first step, and two rows


def test_what_steps_leave_behind_is_not_kept_for_ever():
    day = Day(every_steps=10**6, samples=30_000)
    heard = [step for step in range(1, 2102) if day.after(step, result(), 1e-6)]
    assert heard == [1, 1001, 2001]


def test_losses_are_means_over_samples_since_the_last_row():
    day, rows = Day(every_steps=2), []
    for step, loss in enumerate([3.0, 9.0, 30.0, 0.0], start=1):
        synced = day.after(step, result(loss=loss))
        if synced and synced.row:
            rows.append(synced.row["train/loss"])
    assert rows == [2.0, 5.0]


def test_micro_batches_and_units_of_a_loss_that_weighs_targets():
    day = Day(every_steps=1)
    losses = [torch.tensor(1.0), torch.tensor(2.5), torch.tensor(math.inf)]
    uneven = StepResult(losses, [2, 4, 0], torch.tensor(12.0).double(), 6, torch.tensor(1.0))
    row = day.after(1, uneven).row  # the last is a dummy, and counts for nothing
    assert row["train/loss"] == 1.0
    assert row["train/loss_rank0"] == 2.0


def test_skipped_steps_count_but_their_losses_do_not():
    day = Day(every_steps=4)
    for step, bad in enumerate([0, 1, 1, 0], start=1):
        synced = day.after(step, result(**BAD) if bad else result())
    assert synced.row["train/loss"] == 2.0
    assert synced.skipped == (2, 0, 2)
    for step in range(5, 9):
        synced = day.after(step, result(**BAD))
    assert synced.row["train/loss"] is None
    assert synced.skipped == (6, 4, 4)


def test_time_spent_elsewhere_is_left_out():
    day = Day(every_steps=2)
    day.after(1, result())
    day.after(2, result())
    day.spend(100, Phase.EVALUATE)
    day.after(3, result())
    assert day.after(4, result()).row["time/step_ms"] == pytest.approx(1000)


def test_a_save_closes_the_row():
    """So that nothing half-counted has to be saved, and the journal is the same after a resume."""
    day, rows_at = Day(checkpoint={"every_steps": 4, "every_epochs": None}), {}
    for step in range(1, 13):
        if synced := day.after(step, result(), 0.01):
            rows_at[step] = (synced.row is not None, synced.save)
    assert rows_at[1] == (False, False)
    assert {s: b for s, b in rows_at.items() if s > 1} == {
        4: (True, True), 8: (True, True), 10: (True, False), 12: (True, True),
    }  # fmt: skip


def test_skipped_steps_of_an_earlier_life_count():
    day = Day(every_steps=8, samples=3200, state=State(step=7, skipped=SkippedSteps(5, 2, 3)))
    assert day.after(8, result(**BAD)).skipped == (6, 3, 3)


@pytest.mark.parametrize(("left_s", "near"), [(1e6, False), (4.0, True), (-5.0, True)])
def test_a_deadline_that_is_near_is_a_wish_to_stop(left_s, near):
    day = Day(every_steps=8, samples=3200, deadline=time.time() + left_s)
    synced = day.after(1, result(), 0.5)
    assert (synced.stop, synced.save, synced.row is not None) == (near, near, near)
    assert day.rank_sync.reason == ("the deadline is near" if near else None)


def sync_together(runtime):
    stop = StopRequest()
    if runtime.rank == 1:
        stop.ask("SIGTERM")
    day = Day(runtime, every_steps=2, samples=6000, stop=stop)
    own = runtime.rank + 1
    day.after(1, result(loss=4.0 * own, units=6, own=own))
    synced = day.after(2, result(loss=4.0 * own, units=6, own=own))
    return synced.stop, synced.row["train/loss"], synced.row["train/loss_rank0"]


def test_one_rank_s_wish_is_known_to_all_with_the_loss_over_all():
    first, second, third = run_ranks(3, sync_together)
    assert first == (True, (4.0 + 8.0 + 12.0) * 2 / 12, 4.0)
    assert first[:2] == second[:2] == third[:2]


def scaled(norm, scale, overflows):
    """What a step with a loss scale leaves behind."""
    step = result(norm=norm)
    step.scaling = torch.tensor(scale), torch.tensor(overflows, dtype=torch.int32)
    return step


def test_overflows_of_the_scale_are_not_steps_without_a_gradient():
    day = Day(every_steps=4)
    steps = [(math.inf, 4.0, 1), (math.inf, 2.0, 2), (math.inf, 1.0, 2), (2.0, 0.5, 2)]
    for step, numbers in enumerate(steps, start=1):
        synced = day.after(step, scaled(*numbers))
    assert synced.skipped == SkippedSteps(total=1, in_a_row=0, longest_row=1)
    assert synced.row["train/loss_scale"] == 0.5
    assert synced.row["train/overflow_steps"] == 2
    assert synced.row["train/skipped_steps"] == 1
    assert synced.row["train/loss"] == 2.0  # of the one step that was taken


def measure_memory(runtime):
    module.peak_bytes = lambda device: 10**12 + runtime.rank
    day = Day(runtime, every_steps=1)
    synced = day.after(1, result())
    return synced.row["memory/peak_bytes"], synced.row["time/step_ms"]


def test_memory_is_that_of_the_rank_that_uses_most():
    assert run_ranks(3, measure_memory) == [(10**12 + 2, pytest.approx(1000))] * 3


def test_memory_of_the_host_is_not_measured():
    assert module.peak_bytes(torch.device("cpu")) is None
