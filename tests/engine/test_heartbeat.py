import time

import pytest
import torch
from ranks import run_ranks

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed import collectives
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import heartbeat as module
from ddp_sgd.engine.heartbeat import Heartbeat
from ddp_sgd.engine.state import State
from ddp_sgd.engine.step import StepResult
from ddp_sgd.engine.stopping import StopRequest
from ddp_sgd.engine.timetable import Deadline, Timetable
from ddp_sgd.plan import make_plan


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def result(loss=6.0, units=3, own=3, skipped=0.0, norm=2.0):
    return StepResult(torch.tensor(loss), units, own, torch.tensor(norm), torch.tensor(skipped))


def heartbeat(runtime=None, *, every_steps=10, samples=300, stop=None, **changes):
    runtime = runtime or Runtime()
    described = {"data": {"batch_size": 3}, "epochs": 100, "checkpoint": {"every_epochs": None}}
    config = RunConfig(**described | changes)
    plan = make_plan(config, samples=samples, world_size=runtime.world_size)
    return Heartbeat(
        plan,
        runtime,
        stop or StopRequest(),
        Timetable(config.checkpoint, plan),
        Deadline(config.runtime.deadline),
        every_steps=every_steps,
        state=State(),
    )


def test_a_row_every_so_many_steps_and_at_the_end_of_an_epoch(clock):
    beats = {}
    pulse = heartbeat(every_steps=7, samples=30)  # ten steps an epoch
    for step in range(1, 31):
        clock.now += 0.5
        if beat := pulse.after(step, result(), lr=0.1, wait_s=0.1):
            beats[step] = beat
    assert [step for step, beat in beats.items() if beat.row] == [7, 10, 14, 20, 21, 28, 30]
    assert beats[30].row == {
        "train/loss": 2.0,
        "train/loss_rank0": 2.0,
        "train/lr": 0.1,
        "train/grad_norm": 2.0,
        "train/skipped_steps": 0.0,
        "throughput/samples_per_s": pytest.approx(6.0),
        "time/step_ms": pytest.approx(500.0),
        "time/data_ms": pytest.approx(100.0),
    }


@pytest.mark.parametrize(("step_s", "expected"), [(0.25, [1, 5, 9, 13]), (4.0, list(range(1, 16)))])
def test_ranks_talk_about_once_a_second(clock, step_s, expected):
    pulse, heard = heartbeat(every_steps=1000, samples=3000), []
    for step in range(1, 16):
        clock.now += step_s
        if pulse.after(step, result(), lr=0.1, wait_s=0.0):
            heard.append(step)
    assert heard == expected


def test_never_every_step(clock, monkeypatch):
    calls = []

    def count(tensor, runtime):
        calls.append(tensor)
        return collectives.sum_over_ranks(tensor, runtime)

    monkeypatch.setattr(module, "sum_over_ranks", count)
    pulse = heartbeat(every_steps=50)
    for step in range(1, 101):
        clock.now += 0.001
        pulse.after(step, result(), lr=0.1, wait_s=0.0)
    assert len(calls) == 3  # the first step, and two rows


def test_losses_are_means_over_samples_since_the_last_row(clock):
    pulse = heartbeat(every_steps=2)
    rows = []
    for step, loss in enumerate([3.0, 9.0, 30.0, 0.0], start=1):
        clock.now += 1
        beat = pulse.after(step, result(loss=loss), lr=0.1, wait_s=0.0)
        if beat and beat.row:
            rows.append(beat.row["train/loss"])
    assert rows == [2.0, 5.0]


def test_skipped_steps_count_but_their_losses_do_not(clock):
    pulse = heartbeat(every_steps=4)
    beat = None
    for step, bad in enumerate([0, 1, 1, 0], start=1):
        loss = float("nan") if bad else 6.0
        clock.now += 1
        beat = pulse.after(step, result(loss=loss, skipped=float(bad)), lr=0.1, wait_s=0.0)
    assert beat.row["train/loss"] == 2.0
    assert beat.skipped == (2, 0, 2)
    for step in range(5, 9):
        clock.now += 1
        beat = pulse.after(step, result(loss=float("nan"), skipped=1.0), lr=0.1, wait_s=0.0)
    assert beat.row["train/loss"] is None
    assert beat.skipped == (6, 4, 4)


def test_time_spent_elsewhere_is_left_out(clock):
    pulse = heartbeat(every_steps=2)
    clock.now += 1
    pulse.after(1, result(), lr=0.1, wait_s=0.0)
    clock.now += 1
    pulse.after(2, result(), lr=0.1, wait_s=0.0)
    clock.now += 100  # an evaluation
    pulse.restart_clock()
    clock.now += 1
    pulse.after(3, result(), lr=0.1, wait_s=0.0)
    clock.now += 1
    assert pulse.after(4, result(), lr=0.1, wait_s=0.0).row["time/step_ms"] == pytest.approx(1000)


def test_a_save_closes_the_row(clock):
    """So that nothing half-counted has to be saved, and the journal is the same after a resume."""
    pulse, beats = heartbeat(checkpoint={"every_steps": 4, "every_epochs": None}), {}
    for step in range(1, 13):
        clock.now += 0.01
        if beat := pulse.after(step, result(), lr=0.1, wait_s=0.0):
            beats[step] = (beat.row is not None, beat.save)
    assert beats[1] == (False, False)
    assert {s: b for s, b in beats.items() if s > 1} == {
        4: (True, True), 8: (True, True), 10: (True, False), 12: (True, True),
    }  # fmt: skip


def test_skipped_steps_of_an_earlier_life_count(clock):
    plan = make_plan(RunConfig(), samples=3200, world_size=1)
    timetable = Timetable(RunConfig().checkpoint, plan)
    state = State(step=7, skipped=(5, 2, 3))
    pulse = Heartbeat(
        plan, Runtime(), StopRequest(), timetable, Deadline(None), every_steps=8, state=state
    )
    clock.now += 1
    assert pulse.after(8, result(skipped=1.0), lr=0.1, wait_s=0.0).skipped == (6, 3, 3)


@pytest.mark.parametrize(("left_s", "near"), [(1e6, False), (4.0, True), (-5.0, True)])
def test_a_deadline_that_is_near_is_a_wish_to_stop(left_s, near, clock):
    plan = make_plan(RunConfig(), samples=3200, world_size=1)
    pulse = Heartbeat(
        plan,
        Runtime(),
        StopRequest(),
        Timetable(RunConfig().checkpoint, plan),
        Deadline(time.time() + left_s),
        every_steps=8,
        state=State(),
    )
    clock.now += 0.5
    beat = pulse.after(1, result(), lr=0.1, wait_s=0.0)
    assert (beat.stop, beat.save, beat.row is not None) == (near, near, near)
    assert pulse.reason == ("the deadline is near" if near else None)


def beat_together(runtime):
    stop = StopRequest()
    if runtime.rank == 1:
        stop.ask("SIGTERM")
    pulse = heartbeat(runtime, every_steps=2, samples=6000, stop=stop)
    own = runtime.rank + 1
    pulse.after(1, result(loss=4.0 * own, units=6, own=own), lr=0.1, wait_s=0.0)
    beat = pulse.after(2, result(loss=4.0 * own, units=6, own=own), lr=0.1, wait_s=0.0)
    return beat.stop, beat.row["train/loss"], beat.row["train/loss_rank0"]


def test_one_rank_s_wish_is_known_to_all_with_the_loss_over_all():
    first, second, third = run_ranks(3, beat_together)
    assert first == (True, (4.0 + 8.0 + 12.0) * 2 / 12, 4.0)
    assert first[:2] == second[:2] == third[:2]
