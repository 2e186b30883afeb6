import time

import pytest

from ddp_sgd.config import CheckpointConfig, EvalConfig, RunConfig
from ddp_sgd.engine import triggers as module
from ddp_sgd.engine.triggers import Deadline, Timetable, read_deadline
from ddp_sgd.plan import make_plan

CUT = make_plan(RunConfig(steps=37), samples=320, world_size=1)
PLAN = make_plan(RunConfig(epochs=4), samples=320, world_size=1)  # 10 steps per epoch, 40 in all


def due(**section):
    table = Timetable(CheckpointConfig(**section), PLAN, row_steps=10)
    return [step for step in range(1, 41) if table.save_is_due_at(step)]


def test_saves_by_epochs_by_steps_and_always_at_the_end():
    assert due() == [10, 20, 30, 40]
    assert due(every_epochs=3) == [30, 40]
    assert due(every_epochs=None) == [40]
    assert due(every_epochs=None, every_steps=15) == [15, 30, 40]
    assert due(every_epochs=2, every_steps=15) == [15, 20, 30, 40]


def scored(plan=PLAN, **section):
    table = Timetable(CheckpointConfig(), plan, row_steps=10, score=EvalConfig(**section))
    return [step for step in range(1, plan.total_steps + 1) if table.score_is_due_at(step)]


def test_scores_by_epochs_by_steps_and_always_at_the_end():
    assert scored() == [10, 20, 30, 40]
    assert scored(every_epochs=3) == [30, 40]
    assert scored(every_steps=15) == [15, 30, 40]
    assert scored(every_steps=15, every_epochs=1) == [10, 15, 20, 30, 40]
    assert scored(every_steps=1000) == [40]


def test_a_run_that_ends_within_an_epoch_is_scored_and_saved_there():
    assert scored(CUT) == [10, 20, 30, 37]
    assert scored(CUT, every_epochs=2) == [20, 37]
    assert scored(CUT, every_steps=18) == [18, 36, 37]
    table = Timetable(CheckpointConfig(every_epochs=2), CUT, row_steps=100)
    assert [step for step in range(1, 38) if table.save_is_due_at(step)] == [20, 37]
    assert [step for step in range(1, 38) if table.row_is_due_at(step, 0)] == [10, 20, 30, 37]


@pytest.mark.parametrize(
    ("section", "saves"),
    [
        ({}, [10, 12, 20, 24, 30, 36, 40]),
        ({"every_epochs": 4}, [12, 24, 36, 40]),
        ({"every_epochs": None}, [40]),
        ({"every_epochs": None, "every_steps": 15}, [15, 30, 40]),
    ],
)
def test_what_is_scored_by_steps_is_saved_unless_saves_by_epochs_are_off(section, saves):
    table = Timetable(
        CheckpointConfig(**section), PLAN, row_steps=10, score=EvalConfig(every_steps=12)
    )
    assert [step for step in range(1, 41) if table.save_is_due_at(step)] == saves


def test_rows_by_steps_and_at_the_end_of_each_epoch():
    table = Timetable(CheckpointConfig(), PLAN, row_steps=7)
    rows = [0]
    for step in range(1, 41):
        if table.row_is_due_at(step, rows[-1]):
            rows.append(step)
    assert rows[1:] == [7, 10, 14, 20, 21, 28, 30, 35, 40]
    assert table.row_is_due_at(23, 20)  # where step 21 had to pass without one


@pytest.mark.parametrize(
    "section", [{}, {"every_epochs": 3, "every_steps": 15}, {"every_epochs": None}]
)
@pytest.mark.parametrize("row_steps", [1, 7, 1000])
@pytest.mark.parametrize(("plan", "every_steps"), [(PLAN, None), (CUT, None), (PLAN, 6), (CUT, 6)])
def test_nothing_is_due_before_the_next_date(section, row_steps, plan, every_steps):
    score = EvalConfig(every_steps=every_steps)
    table = Timetable(CheckpointConfig(**section), plan, row_steps=row_steps, score=score)
    for step in range(plan.total_steps):
        date = table.next_date(step)
        assert step < date <= plan.total_steps
        for between in range(step + 1, date):
            assert not table.save_is_due_at(between)
            assert not table.row_is_due_at(between, step)


def test_saves_by_the_clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    table = Timetable(CheckpointConfig(every_minutes=2.0), PLAN, row_steps=10)
    now[0] = 119.0
    assert not table.save_is_due_now()
    now[0] = 120.0
    assert table.save_is_due_now()
    table.start_over()
    assert not table.save_is_due_now()
    assert not Timetable(CheckpointConfig(), PLAN, row_steps=10).save_is_due_now()


@pytest.mark.parametrize(
    ("left_s", "save_s", "score_s", "pause_s", "near"),
    [
        (1000.0, 0.0, 0.0, 1.0, False),
        (6.0, 0.0, 0.0, 1.0, False),
        (4.0, 0.0, 0.0, 1.0, True),
        (30.0, 15.0, 0.0, 1.0, True),
        (30.0, 0.0, 15.0, 1.0, True),
        (30.0, 0.0, 0.0, 15.0, True),
        (-1.0, 0.0, 0.0, 1.0, True),
    ],
)
def test_a_run_stops_while_there_is_time_to_save(
    left_s, save_s, score_s, pause_s, near, monkeypatch
):
    monkeypatch.setattr(module.time, "time", lambda: 1e9)
    deadline = Deadline(1e9 + left_s)
    deadline.save_s, deadline.score_s = save_s, score_s
    assert deadline.is_near(pause_s) is near


def test_without_a_deadline_nothing_is_near():
    assert not Deadline(None).is_near(1e9)


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        (None, {}, None),
        (1.8e9, {"SLURM_JOB_END_TIME": "17"}, 1.8e9),
        ("2026-12-24T18:00:00Z", {}, 1798135200.0),
        ("2026-12-24 19:00+01:00", {}, 1798135200.0),
        (None, {"SLURM_JOB_END_TIME": "1798135200"}, 1798135200.0),
        (None, {"SLURM_JOB_END_TIME": "UNLIMITED"}, None),
    ],
)
def test_where_the_deadline_comes_from(given, environ, expected):
    assert read_deadline(given, environ) == expected


def test_a_time_without_a_zone_is_local(monkeypatch):
    monkeypatch.setenv("TZ", "UTC-3")
    time.tzset()
    try:
        assert read_deadline("2026-12-24T21:00:00", {}) == 1798135200.0
    finally:
        monkeypatch.undo()
        time.tzset()
