"""Curves of the user: what is refused before the run, and with which line."""

import math
from operator import sub

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from user_code import Triangle, decay_by_halves

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.errors import ConfigError, ExitCode
from ddp_sgd.explain import main
from ddp_sgd.optim.curve import Curve, check_curve, steps_to_check
from ddp_sgd.optim.schedule import build_schedule
from ddp_sgd.plan import make_plan

HALVES = {"class_path": "user_code.decay_by_halves", "call": False}


def build(curve, *, epochs=4, samples=320, world_size=1, **schedule):
    """Ten steps per epoch on one rank."""
    config = RunConfig(epochs=epochs, schedule={"curve": curve, **schedule})
    plan = make_plan(config, samples=samples, world_size=world_size)
    return build_schedule(config.schedule, plan), plan


def refused(curve, **more):
    with pytest.raises(ConfigError) as caught:
        build(curve, **more)
    assert caught.value.exit_code == ExitCode.CONFIG == 64
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_function_gives_the_factor_of_the_peak_at_every_step():
    schedule, plan = build(HALVES)
    assert plan.schedule == "user_code.decay_by_halves"
    expected = [0.5 ** (step // 10) for step in range(39)] + [0.0]
    assert [schedule(step) for step in range(40)] == expected


def test_an_object_that_is_called_is_a_curve():
    schedule, _ = build({"class_path": "user_code.Triangle", "init_args": {"peak_at": 0.25}})
    triangle = Triangle(0.25)
    assert [schedule(step) for step in range(40)] == [triangle(step, 10, 40) for step in range(40)]


def test_a_curve_of_ones_own_rises_only_if_it_is_told_to():
    """As one_cycle does; a warm-up of its own would count twice."""
    schedule, plan = build(HALVES, samples=1280, world_size=4)
    assert (plan.scale, plan.warmup_steps, schedule(0)) == (4, 0, 1.0)
    schedule, plan = build(HALVES, samples=1280, world_size=4, warmup_epochs=1)
    assert (plan.warmup_steps, schedule(0), schedule(10)) == (10, 0.25, 0.5)


@pytest.mark.parametrize(("value", "factor"), [(0, 0.0), (np.float32(0.5), 0.5), (True, 1.0)])
def test_numbers_of_any_kind_are_factors(value, factor):
    curve = Curve(lambda *_: value, 10, 40)
    assert type(curve(3)) is float
    assert curve(3) == factor
    assert Curve(lambda *_: torch.tensor(value), 10, 40)(3) == factor


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (-0.1, "-0.1"),
        ("=nan", "nan"),
        ("=inf", "inf"),
        ("0.5", "'0.5'"),
        (None, "null"),
        ([1.0], "[1.0]"),
    ],
)
@pytest.mark.parametrize("at", [0, 17, 39])
def test_a_value_that_is_no_rate_is_refused_with_its_step(value, words, at):
    curve = {"class_path": "user_code.BadCurve", "init_args": {"at": at, "value": value}}
    assert refused(curve) == (
        f"schedule.curve is {words} for step={at}, steps_per_epoch=10, total_steps=40; return a "
        "finite number of at least 0, the factor of the peak rate."
    )


def test_a_curve_that_raises_is_refused_with_its_step():
    curve = {"class_path": "user_code.BadCurve", "init_args": {"at": 17, "value": "raise"}}
    assert refused(curve) == (
        "schedule.curve raises RuntimeError: no such step, for step=17, steps_per_epoch=10, "
        "total_steps=40; correct the function."
    )


def test_an_array_of_several_numbers_is_none():
    with pytest.raises(ConfigError, match=r"raises .*for step=3, steps_per_epoch=10"):
        Curve(lambda *_: np.ones(2), 10, 40)(3)


def test_a_curve_with_a_memory_is_refused():
    text = refused({"class_path": "user_code.Counting"})
    assert text.startswith("schedule.curve is not the same twice: at step 39 of the run")
    assert text.endswith("; work it out from the arguments alone.")


def test_a_curve_that_is_zero_throughout_is_refused():
    plan = make_plan(RunConfig(epochs=4), samples=320, world_size=1)
    with pytest.raises(ConfigError, match="is 0 at all 40 steps of the run, so that nothing is"):
        check_curve(Curve(lambda *_: 0.0, 10, 40), plan)


def test_what_cannot_be_called_is_refused_with_what_to_name():
    assert refused({"class_path": "user_code.NOT_CALLABLE", "call": False}) == (
        "schedule.curve is a int; name a function of (step, steps_per_epoch, total_steps) with "
        "schedule.curve.call=false, or an object that is called so."
    )
    text = refused({"class_path": "user_code.Triangle", "call": False})
    assert text.startswith("schedule.curve is the class Triangle; name a function of ")
    text = refused({"class_path": "user_code.decay_by_halves"})
    assert "set schedule.curve.call=false to take it without a call" in text


@given(st.integers(1, 10**9), st.integers(1, 10**6))
def test_a_long_run_is_checked_at_a_bounded_number_of_steps(total_steps, steps_per_epoch):
    steps = steps_to_check(total_steps, steps_per_epoch)
    assert len(steps) <= 100_000 + 10_000 + 2 * 1_000
    assert max(map(sub, steps[1:], steps), default=0) <= max(1, -(-total_steps // 10_000))
    assert (steps[0], steps[-1]) == (0, total_steps - 1)
    assert steps == sorted(set(steps))
    if total_steps <= 100_000:
        assert len(steps) == total_steps
        return
    assert set(range(1_000)) | set(range(total_steps - 1_000, total_steps)) <= set(steps)
    if total_steps / steps_per_epoch <= 100_000:
        assert set(range(0, total_steps, steps_per_epoch)) <= set(steps)


def test_a_fault_at_the_beginning_of_an_epoch_of_a_long_run_is_found():
    curve = {"class_path": "user_code.BadCurve", "init_args": {"at": 777_770, "value": -1}}
    assert "for step=777770" in refused(curve, epochs=100_000)


@pytest.mark.parametrize("by", ["step", "epoch"])
def test_by_epoch_a_curve_is_asked_at_the_beginning_of_epochs_only(by):
    schedule, plan = build({"class_path": "user_code.Triangle"}, by=by)
    triangle = Triangle()
    begins = [step if by == "step" else step - step % 10 for step in range(40)]
    assert [schedule(step) for step in range(40)] == [triangle(step, 10, 40) for step in begins]
    assert plan.by == by


def test_after_a_warm_up_that_shifts_a_curve_has_the_rest_of_the_run():
    schedule, _ = build(HALVES, warmup="shift", warmup_steps=13, warmup_start=0.2)
    for step in range(40):
        rise = 0.2 + 0.8 * min(1.0, step / 13)
        expected = rise * decay_by_halves(max(0, step - 13), 10, 27)
        assert math.isclose(schedule(step), expected, rel_tol=1e-15), step


def test_explain_draws_a_curve_and_names_it(capsys):
    argv = ["--samples=320", "--epochs=4"]
    assert main([*argv, "--schedule.curve={class_path: user_code.Triangle}"]) == 0
    text = capsys.readouterr().out
    assert "  schedule              user_code.Triangle\n" in text
    plot = [line.partition("|")[2] for line in text.splitlines() if "|" in line]
    top = [place for place, mark in enumerate(plot[0]) if mark != " "]
    assert 25 < sum(top) / len(top) < 34  # of 60 columns: the peak is in the middle
    assert plot[-1].strip()[0] == plot[-1].strip()[-1] == "-"  # a twentieth of it at both ends


def test_explain_refuses_a_bad_curve_with_64(capsys):
    argv = ["--samples=320", "--epochs=4", "--schedule.curve.class_path=user_code.BadCurve"]
    argv += ["--schedule.curve.init_args={at: 3, value: -1}"]
    assert main(argv) == ExitCode.CONFIG
    assert "error: schedule.curve is -1 for step=3" in capsys.readouterr().err


def test_a_million_steps_take_some_ten_thousand_calls():
    calls = [0]

    def counted(*_):
        calls[0] += 1
        return 1.0

    plan = make_plan(RunConfig(steps=10**6), samples=32_000, world_size=1)
    check_curve(Curve(counted, plan.steps_per_epoch, plan.total_steps), plan)
    assert plan.steps_per_epoch == 1000
    assert 11_000 < calls[0] < 14_000
