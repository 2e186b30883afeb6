import math
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import WAIT_S
from torch.optim import lr_scheduler

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.errors import ConfigError
from ddp_sgd.optim.schedule import (
    build_momentum,
    build_schedule,
    constant,
    cosine,
    linear,
    one_cycle,
    polynomial,
    step_decay,
    warm_up,
)
from ddp_sgd.plan import make_plan

# A factor is made by a handful of operations on numbers of size 1, each rounded once.
ROUNDING = 16 * sys.float_info.epsilon

lengths = st.integers(1, 10_000)
finals = st.floats(0, 1)
powers = st.floats(0.1, 10)
peaks = st.floats(0.001, 0.999)
parts = st.floats(0, 2)  # of a length, so that the time after the end is met as well
curves = st.one_of(
    st.just(lambda _: constant()),
    st.builds(lambda f: lambda n: cosine(n, f), finals),
    st.builds(lambda f: lambda n: linear(n, f), finals),
    st.builds(lambda p, f: lambda n: polynomial(n, p, f), powers, finals),
    st.builds(lambda p, f: lambda n: one_cycle(n, p, f), peaks, finals),
)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (constant(), {0: 1, 7: 1, 1e9: 1}),
        (step_decay([10, 20], 0.1), {0: 1, 9: 1, 9.99: 1, 10: 0.1, 19: 0.1, 20: 0.01, 99: 0.01}),
        (step_decay([], 0.1), {0: 1, 99: 1}),
        (step_decay([5, 5], 0.5), {4: 1, 5: 0.25}),
        (cosine(100, 0.0), {0: 1, 50: 0.5, 100: 0, 1e6: 0}),
        (cosine(90, 0.2), {0: 1, 30: 0.8, 45: 0.6, 60: 0.4, 90: 0.2, 91: 0.2}),
        (linear(10, 0.0), {0: 1, 2.5: 0.75, 5: 0.5, 10: 0, 11: 0}),
        (linear(10, 0.5), {0: 1, 5: 0.75, 10: 0.5, 11: 0.5}),
        (polynomial(10, 2.0, 0.0), {0: 1, 5: 0.25, 9: 0.01, 10: 0, 11: 0}),
        (polynomial(10, 0.5, 0.1), {0: 1, 7.5: 0.55, 10: 0.1, 11: 0.1}),
        (one_cycle(100, 0.3, 0.0), {0: 0.04, 15: 0.52, 30: 1, 65: 0.5, 100: 0, 101: 0}),
        (one_cycle(10, 0.5, 0.5), {0: 0.04, 5: 1, 7.5: 0.75, 10: 0.5, 11: 0.5}),
        (warm_up(constant(), 10, 0.1), {0: 0.1, 5: 0.55, 9: 0.91, 10: 1, 11: 1}),
        (warm_up(constant(), 4, 1.0), {0: 1, 1: 1, 3: 1, 4: 1}),
        (warm_up(linear(10, 0.0), 5, 0.5), {0: 0.5, 2: 0.56, 4: 0.54, 5: 0.5, 10: 0}),
    ],
)
def test_values_worked_out_by_hand(schedule, values):
    for step, value in values.items():
        assert schedule(step) == pytest.approx(value, abs=ROUNDING)


@given(lengths, finals, parts)
def test_cosine_replays_its_formula(steps, final, part):
    t = part * steps
    expected = final
    if t < steps:
        expected += (1 - final) * (1 + math.cos(math.pi * t / steps)) / 2
    assert cosine(steps, final)(t) == pytest.approx(expected, abs=ROUNDING)


@given(lengths, finals, parts)
def test_linear_replays_its_formula(steps, final, part):
    t = part * steps
    expected = final if t >= steps else 1 - (1 - final) * t / steps
    assert linear(steps, final)(t) == pytest.approx(expected, abs=ROUNDING)


@given(lengths, powers, finals, st.floats(0, 0.99))
def test_polynomial_replays_its_formula(steps, power, final, part):
    t = part * steps
    expected = final + (1 - final) * (1 - t / steps) ** power
    assert polynomial(steps, power, final)(t) == pytest.approx(expected, abs=ROUNDING)
    assert polynomial(steps, power, final)(steps + t) == final


@given(lengths, peaks, finals, parts)
def test_one_cycle_replays_its_formula(steps, peak_at, final, part):
    t, peak = part * steps, peak_at * steps
    if t < peak:
        expected = 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * t / peak)) / 2
    elif t < steps:
        x = (t - peak) / (steps - peak)
        expected = 1 + (final - 1) * (1 - math.cos(math.pi * x)) / 2
    else:
        expected = final
    assert one_cycle(steps, peak_at, final)(t) == pytest.approx(expected, abs=ROUNDING)


@given(st.lists(st.integers(0, 1000)).map(sorted), st.floats(0.01, 1), st.floats(0, 1100))
def test_step_decay_replays_its_formula(milestones, gamma, t):
    expected = 1.0
    for milestone in milestones:
        expected *= gamma if milestone <= t else 1.0
    # the replay rounds once a milestone
    assert step_decay(milestones, gamma)(t) == pytest.approx(
        expected, rel=(len(milestones) + 4) * sys.float_info.epsilon, abs=sys.float_info.min
    )


@given(curves, lengths, st.integers(0, 10_000), st.floats(0.001, 1), parts)
def test_factors_stay_between_zero_and_one(build, steps, ramp, start, part):
    assert 0 <= build(steps)(part * steps) <= 1
    assert 0 <= warm_up(build(steps), ramp, start)(part * steps) <= 1


@given(curves, lengths, st.integers(0, 10_000), st.floats(0.001, 1), parts)
def test_warm_up_multiplies_and_does_not_shift(build, steps, ramp, start, part):
    then = build(steps)
    warm, t = warm_up(then, ramp, start), part * steps
    if t < ramp:
        expected = then(t) * (start + (1 - start) * t / ramp)
        assert warm(t) == pytest.approx(expected, abs=ROUNDING)
    else:
        assert warm(t) == then(t)
    assert warm(ramp) == then(ramp)


@pytest.mark.parametrize(
    ("schedule", "steepest"),  # slope per length of the curve, from the derivative of its formula
    [
        (cosine(100, 0.1), math.pi / 2),
        (linear(100, 0.1), 1),
        (polynomial(100, 3.0, 0.1), 3),
        (one_cycle(100, 0.25, 0.1), math.pi / 2 / 0.25),
        (warm_up(cosine(100, 0.1), 30, 0.2), math.pi / 2 + 1 / 0.3),
        (warm_up(one_cycle(100, 0.25, 0.1), 50, 0.2), math.pi / 2 / 0.25 + 1 / 0.5),
    ],
)
def test_curves_are_continuous_joints_included(schedule, steepest):
    grid = [schedule(step / 100) for step in range(12_000)]
    jumps = [abs(now - before) for before, now in pairwise(grid)]
    assert max(jumps) <= steepest / 10_000 + ROUNDING


def test_a_schedule_keeps_no_state():
    schedule = warm_up(one_cycle(50, 0.3, 0.1), 10, 0.2)
    forwards = [schedule(step) for step in range(60)]
    assert [schedule(step) for step in reversed(range(60))] == forwards[::-1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cosine(0, 0.0), "schedule.steps is 0; choose"),
        (lambda: linear(-1, 0.0), "schedule.steps is -1; choose"),
        (lambda: polynomial(0, 2.0, 0.0), "schedule.steps is 0; choose"),
        (lambda: one_cycle(0, 0.3, 0.0), "schedule.steps is 0; choose"),
        (lambda: cosine(5, -0.1), "schedule.final is -0.1; choose"),
        (lambda: linear(5, 1.1), "schedule.final is 1.1; choose"),
        (lambda: polynomial(5, 2.0, math.nan), "schedule.final is nan; choose"),
        (lambda: one_cycle(5, 0.3, 2), "schedule.final is 2; choose"),
        (lambda: polynomial(5, 0.0, 0.0), "schedule.power is 0.0; choose"),
        (lambda: one_cycle(5, 0.0, 0.0), "schedule.peak_at is 0.0; choose"),
        (lambda: one_cycle(5, 1.0, 0.0), "schedule.peak_at is 1.0; choose"),
        (lambda: step_decay([5], 0.0), "schedule.gamma is 0.0; choose"),
        (lambda: step_decay([5, 3], 0.1), "schedule.milestones is [5, 3] in steps; put"),
        (lambda: step_decay([-1, 3], 0.1), "schedule.milestones is [-1, 3] in steps; put"),
        (lambda: warm_up(constant(), -1, 0.1), "schedule.warmup_steps is -1; choose"),
        (lambda: warm_up(constant(), 5, 0.0), "schedule.warmup_start is 0.0; choose"),
        (lambda: warm_up(constant(), 5, 1.5), "schedule.warmup_start is 1.5; choose"),
    ],
)
def test_bad_arguments_are_refused_with_value_and_remedy(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    assert str(caught.value).startswith(words)


def _rates_of_torch(steps, build):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = build(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


# torch works most of these out from the last rate, so that its rounding errors add up step by step.
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (cosine(50, 0.0), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=50)),
        (cosine(50, 0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=50, eta_min=0.1)),
        (step_decay([10, 30], 0.3), lambda o: lr_scheduler.MultiStepLR(o, [10, 30], 0.3)),
        (polynomial(50, 2.0, 0.0), lambda o: lr_scheduler.PolynomialLR(o, 50, power=2.0)),
        (linear(50, 0.2), lambda o: lr_scheduler.LinearLR(o, 1.0, 0.2, total_iters=50)),
        (
            # torch's peak lies at pct_start x total_steps - 1, and its end at total_steps - 1
            one_cycle(50, (0.3 * 51 - 1) / 50, 1 / 25 / 1e4),
            lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=51, cycle_momentum=False),
        ),
    ],
    ids=["cosine", "cosine to 0.1", "step", "polynomial", "linear", "one_cycle"],
)
def test_torch_agrees(ours, theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch counts the constructor as a step
        rates = _rates_of_torch(50, theirs)
    assert [ours(step) for step in range(50)] == pytest.approx(rates, rel=1e-12, abs=1e-12)


def _build(samples=1000, world_size=4, **sections):
    config = RunConfig.model_validate({"epochs": 10, **sections})
    plan = make_plan(config, samples=samples, world_size=world_size)
    return build_schedule(config.schedule, plan), plan


EPOCHS, PEAK = 90, 0.4


def _per_epoch(build):
    """Rates of a recipe that steps torch's scheduler after each epoch, by epoch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return [PEAK * rate for rate in _rates_of_torch(EPOCHS, build)]


def _torchvision(main, warmup_epochs=5, decay=0.01):
    """The schedule of torchvision's reference script for classification."""

    def build(optimizer):
        warm = lr_scheduler.LinearLR(optimizer, start_factor=decay, total_iters=warmup_epochs)
        both = [warm, main(optimizer, EPOCHS - warmup_epochs)]
        return lr_scheduler.SequentialLR(optimizer, both, milestones=[warmup_epochs])

    return _per_epoch(build)


def _timm(**arguments):
    """What timm's script takes by default: a cosine that is stepped by epoch."""
    from timm.scheduler import CosineLRScheduler  # which takes seconds to import

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = CosineLRScheduler(optimizer, **arguments)
    rates = []
    for epoch in range(EPOCHS):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def _annealed(optimizer, length):
    return lr_scheduler.CosineAnnealingLR(optimizer, T_max=length)


SHIFTED = {"by": "epoch", "warmup": "shift", "warmup_epochs": 5, "warmup_start": 0.01}
TIMM = {"by": "epoch", "warmup_epochs": 5, "warmup_start": 1e-5 / PEAK}
RECIPES = {
    "torchvision, StepLR": (
        {"name": "step", "milestones": [30, 60], "by": "epoch", "warmup_epochs": 0},
        lambda: _per_epoch(lambda o: lr_scheduler.StepLR(o, 30, 0.1)),
    ),
    "torchvision, cosine after a warm-up": (SHIFTED, lambda: _torchvision(_annealed)),
    "torchvision, cosine to lr_min": (
        SHIFTED | {"final": 0.05},
        lambda: _torchvision(lambda o, n: lr_scheduler.CosineAnnealingLR(o, T_max=n, eta_min=0.05)),
    ),
    "torchvision, StepLR after a warm-up": (
        SHIFTED | {"name": "step", "milestones": [30, 60]},
        lambda: _torchvision(lambda o, _: lr_scheduler.StepLR(o, 30, 0.1)),
    ),
    "timm": (
        TIMM | {"warmup": "replace"},
        lambda: _timm(t_initial=90, warmup_t=5, warmup_lr_init=1e-5),
    ),
    "timm, warmup_prefix": (
        TIMM | {"warmup": "shift", "final": 0.1},
        lambda: _timm(
            t_initial=85, warmup_t=5, warmup_lr_init=1e-5, warmup_prefix=True, lr_min=0.04
        ),
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_of_torchvision_and_timm_at_every_step_of_90_epochs(recipe):
    section, theirs = RECIPES[recipe]
    schedule, plan = _build(
        epochs=EPOCHS,
        schedule=section,
        optim={"lr": PEAK, "scaling": "none"},
    )
    assert (plan.steps_per_epoch, plan.peak_lr) == (8, PEAK)
    rates = [plan.peak_lr * schedule(step) for step in range(plan.total_steps)]
    expected = [rate for rate in theirs() for _ in range(8)]
    assert rates == pytest.approx(expected, rel=0, abs=1e-6 * PEAK)


def test_by_step_a_shifted_warm_up_is_sequential_in_torch():
    section = {"warmup": "shift", "warmup_steps": 13, "warmup_start": 0.1}
    schedule, plan = _build(schedule=section)
    assert plan.total_steps == 80

    def theirs(optimizer):
        warm = lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=13)
        both = [warm, lr_scheduler.CosineAnnealingLR(optimizer, T_max=80 - 13)]
        return lr_scheduler.SequentialLR(optimizer, both, milestones=[13])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        rates = _rates_of_torch(80, theirs)
    assert [schedule(step) for step in range(80)] == pytest.approx(rates, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("warmup", ["multiply", "shift", "replace"])
@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "polynomial"])
def test_a_warm_up_begins_at_its_start_and_ends_at_the_curve(name, warmup):
    section = {"name": name, "warmup_steps": 20, "warmup_start": 0.1}
    schedule, plan = _build(schedule=section | {"warmup": warmup})
    alone, _ = _build(schedule={"name": name, "warmup_steps": 0})
    steps = range(20, 80)
    assert schedule(0) == pytest.approx(0.1, rel=ROUNDING)
    if warmup == "shift":
        shorter = {"constant": constant(), "cosine": cosine(60, 0.0), "linear": linear(60, 0.0)}
        then = shorter.get(name, polynomial(60, 2.0, 0.0))
        assert [schedule(step) for step in steps] == [then(step - 20) for step in steps]
        assert schedule(10) == pytest.approx(0.55, rel=ROUNDING)
    else:
        assert [schedule(step) for step in steps] == [alone(step) for step in steps]
        whole = 1.0 if warmup == "replace" else alone(10)
        assert schedule(10) == pytest.approx(0.55 * whole, rel=ROUNDING)
    assert plan.warmup == warmup


def test_a_warm_up_that_shifts_beyond_the_end_of_the_run_is_cut_off():
    schedule, plan = _build(epochs=2, schedule={"warmup": "shift", "warmup_epochs": 4})
    assert plan.warmup_steps == 2 * plan.total_steps == 32
    assert schedule(15) == pytest.approx(0.25 + 0.75 * 15 / 32)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "polynomial", "one_cycle"])
def test_by_epoch_all_steps_of_an_epoch_have_the_rate_of_the_first(name):
    schedule, plan = _build(schedule={"name": name, "by": "epoch"})
    by_step, _ = _build(schedule={"name": name})
    for step in range(plan.total_steps):
        assert schedule(step) == by_step(step // 8 * 8)


MOMENTUM = {"momentum_start": 0.5, "warmup_epochs": 2}


def test_momentum_rises_along_the_warm_up_in_a_straight_line():
    _, plan = _build(schedule=MOMENTUM)
    momentum = build_momentum(plan)
    assert plan.warmup_steps == 16
    for step in range(80):
        expected = 0.5 + 0.4 * min(1.0, step / 16)
        assert momentum(step) == pytest.approx(expected, rel=ROUNDING)
    assert {momentum(step) for step in range(16, 80)} == {0.9}  # to the bit


def test_momentum_may_fall_and_may_change_by_epoch():
    section = {"momentum_start": 0.95, "warmup_epochs": 1.5, "by": "epoch"}
    _, plan = _build(schedule=section, optim={"momentum": 0.85})
    momentum = build_momentum(plan)
    assert {momentum(step) for step in range(8)} == {0.95}
    assert momentum(8) == momentum(15) == pytest.approx(0.95 - 0.1 * 8 / 12)
    assert {momentum(step) for step in range(16, 80)} == {0.85}


def test_momentum_that_does_not_change_has_no_schedule():
    assert build_momentum(_build()[1]) is None


@pytest.mark.parametrize("warm", [{"warmup_epochs": 0}, {"warmup_steps": 0}, {}])
def test_momentum_along_no_warm_up_is_refused(warm):
    """Whether ``auto`` is none is known with the plan: it is one rank at its own batch."""
    with pytest.raises(ConfigError) as caught:
        _build(world_size=1, schedule={"momentum_start": 0.5, **warm})
    assert str(caught.value) == (
        "schedule.momentum_start is 0.5 while the run has no warm-up; set "
        "schedule.warmup_epochs=3 or so."
    )


@pytest.mark.parametrize("epochs", [1, 2, 30, 31, 90])
def test_a_shortened_run_takes_the_steps_of_the_whole_one(epochs):
    sections = {"schedule": {"name": "step", "milestones": [30, 60], "warmup_epochs": 5}}
    whole, _ = _build(epochs=90, **sections)
    schedule, plan = _build(epochs=epochs, **sections)
    steps = range(plan.total_steps)
    assert [schedule(step) for step in steps] == [whole(step) for step in steps]


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"name": "constant"}, lambda p: constant()),
        ({"name": "cosine", "final": 0.1}, lambda p: cosine(p.total_steps, 0.1)),
        ({"name": "linear", "final": 0.2}, lambda p: linear(p.total_steps, 0.2)),
        (
            {"name": "polynomial", "power": 3.0, "final": 0.3},
            lambda p: polynomial(p.total_steps, 3.0, 0.3),
        ),
        (
            {"name": "one_cycle", "peak_at": 0.4, "final": 0.1},
            lambda p: one_cycle(p.total_steps, 0.4, 0.1),
        ),
        (
            {"name": "step", "milestones": [3.0, 5.5], "gamma": 0.5},
            lambda p: step_decay([3 * p.steps_per_epoch, round(5.5 * p.steps_per_epoch)], 0.5),
        ),
    ],
)
def test_every_name_of_the_configuration_builds_its_curve(section, expected):
    schedule, plan = _build(schedule={**section, "warmup_epochs": 0.0})
    assert plan.steps_per_epoch == 8
    for step in range(plan.total_steps + 5):
        assert schedule(step) == expected(plan)(step)


def test_warm_up_rises_from_the_base_rate_to_the_peak():
    schedule, plan = _build(schedule={"name": "constant"})
    assert plan.warmup_steps == 8
    assert plan.peak_lr * schedule(0) == pytest.approx(0.05)
    assert plan.peak_lr * schedule(4) == pytest.approx((0.05 + 0.2) / 2)
    assert plan.peak_lr * schedule(8) == plan.peak_lr == pytest.approx(0.2)


def test_one_rank_at_its_own_batch_needs_no_warm_up():
    schedule, plan = _build(world_size=1, schedule={"name": "constant"})
    assert [plan.peak_lr * schedule(step) for step in (0, 1, 100)] == [0.05] * 3


def test_schedules_need_no_torch():
    program = "import ddp_sgd.optim.schedule, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=WAIT_S)
