"""Schedules: pure functions from the step to a factor of the peak rate. No torch, no state.

A schedule is evaluated at the number of steps already taken, so the first step uses ``f(0)``. The
step may be a real number, at least 0, and past the end a curve keeps its final value.
"""

import math
from collections.abc import Callable, Sequence

from ddp_sgd.config.sections import ScheduleConfig
from ddp_sgd.errors import ConfigError
from ddp_sgd.optim.curve import build_curve, check_curve
from ddp_sgd.plan import Plan

Schedule = Callable[[float], float]

ONE_CYCLE_START = 1 / 25
"""Factor at which the one-cycle curve starts: the default ``div_factor`` of torch's OneCycleLR."""


def constant() -> Schedule:
    """Stay at the peak: f(t) = 1.

    Returns:
        A function of the step.
    """
    return lambda _: 1.0


def step_decay(milestones: Sequence[int], gamma: float) -> Schedule:
    """Multiply the rate by a factor at each milestone: f(t) = gamma ^ #{m in milestones: m <= t}.

    Args:
        milestones: Optimizer steps from which the factor counts, at least 0, ascending.
        gamma: Factor at each milestone, above 0.

    Returns:
        A function of the step.

    Raises:
        ConfigError: ``milestones`` do not ascend or are negative, or ``gamma`` is not above 0.

    Source:
        Goyal et al. 2017, arXiv:1706.02677, section 5.1; the curve of torch's MultiStepLR.
    """
    steps = tuple(milestones)
    if list(steps) != sorted(steps) or any(step < 0 for step in steps):
        raise ConfigError(
            f"schedule.milestones is {list(steps)} in steps; put steps in ascending order, "
            "none below 0, such as [100, 200]."
        )
    _check(gamma > 0, "gamma", gamma, "a factor above 0, such as 0.1")
    return lambda step: gamma ** sum(milestone <= step for milestone in steps)


def cosine(steps: int, final: float) -> Schedule:
    """Fall along half a cosine: f(t) = final + (1 - final) (1 + cos(pi t / steps)) / 2.

    Args:
        steps: Length of the fall in optimizer steps, at least 1.
        final: Factor at the end and after it, in [0, 1].

    Returns:
        A function of the step.

    Raises:
        ConfigError: ``steps`` is below 1 or ``final`` lies outside [0, 1].

    Source:
        Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5, without restarts.
    """
    _check_length(steps)
    _check_final(final)
    return lambda step: _blend(1.0, final, _half_cosine(_part(step, steps)))


def linear(steps: int, final: float) -> Schedule:
    """Fall in a straight line: f(t) = 1 - (1 - final) t / steps.

    Args:
        steps: Length of the fall in optimizer steps, at least 1.
        final: Factor at the end and after it, in [0, 1].

    Returns:
        A function of the step.

    Raises:
        ConfigError: ``steps`` is below 1 or ``final`` lies outside [0, 1].

    Source:
        Li, Yumer and Ramanan 2020, "Budgeted training", arXiv:1905.04753.
    """
    return polynomial(steps, 1.0, final)


def polynomial(steps: int, power: float, final: float) -> Schedule:
    """Fall along a power of what is left: f(t) = final + (1 - final) (1 - t / steps) ^ power.

    Args:
        steps: Length of the fall in optimizer steps, at least 1.
        power: Exponent, above 0; 1 is a straight line.
        final: Factor at the end and after it, in [0, 1].

    Returns:
        A function of the step.

    Raises:
        ConfigError: ``steps`` is below 1, ``power`` is not above 0 or ``final`` lies outside
            [0, 1].

    Source:
        The "poly" policy of Chen et al. 2016, arXiv:1606.00915; power 2 for large batches: You et
        al. 2017, arXiv:1708.03888.
    """
    _check_length(steps)
    _check(power > 0, "power", power, "an exponent above 0, such as 2.0")
    _check_final(final)
    return lambda step: _blend(1.0, final, 1.0 - (1.0 - _part(step, steps)) ** power)


def one_cycle(steps: int, peak_at: float, final: float) -> Schedule:
    """Rise along half a cosine from 1/25 to the peak, then fall along another.

    With p = peak_at steps and c(x) = (1 - cos(pi x)) / 2::

        f(t) = 1/25 + (1 - 1/25) c(t / p)               for t < p
        f(t) = 1 + (final - 1) c((t - p) / (steps - p)) from p on

    Args:
        steps: Length of rise and fall together in optimizer steps, at least 1.
        peak_at: Part of the length at which the peak is reached, in (0, 1).
        final: Factor at the end and after it, in [0, 1].

    Returns:
        A function of the step.

    Raises:
        ConfigError: ``steps`` is below 1, ``peak_at`` lies outside (0, 1) or ``final`` outside
            [0, 1].

    Source:
        Smith 2018, arXiv:1803.09820; both cosines and the 1/25: torch's OneCycleLR.
    """
    _check_length(steps)
    _check(0 < peak_at < 1, "peak_at", peak_at, "a part of the run in (0, 1), such as 0.3")
    _check_final(final)
    peak = peak_at * steps

    def factor(step: float) -> float:
        if step < peak:
            return _blend(ONE_CYCLE_START, 1.0, _half_cosine(step / peak))
        return _blend(1.0, final, _half_cosine(_part(step - peak, steps - peak)))

    return factor


def warm_up(then: Schedule, steps: int, start: float) -> Schedule:
    """Rise in a straight line from a fraction of another schedule to all of it.

    f(t) = then(t) (start + (1 - start) t / steps) for t < steps, and then(t) from there on.

    Args:
        then: Schedule that the ramp multiplies; it is not shifted.
        steps: Length of the ramp in optimizer steps, at least 0.
        start: Factor at step 0, in (0, 1].

    Returns:
        A function of the step; from ``steps`` on it equals ``then``.

    Raises:
        ConfigError: ``steps`` is negative or ``start`` lies outside (0, 1].

    Source:
        Gradual warm-up: Goyal et al. 2017, arXiv:1706.02677, section 2.2.
    """
    _check(steps >= 0, "warmup_steps", steps, "a number of steps that is at least 0")
    _check(0 < start <= 1, "warmup_start", start, "a factor in (0, 1], such as 0.1")
    if steps == 0:
        return then
    return lambda step: then(step) * _blend(start, 1.0, _part(step, steps))


def shifted(then: Schedule, steps: int) -> Schedule:
    """Begin another schedule later: f(t) = then(max(0, t - steps)).

    Args:
        then: The schedule.
        steps: Optimizer steps before it begins, at least 0.

    Returns:
        A function of the step.

    Source:
        The cosine after a warm-up in the reference script for classification of torchvision.
    """
    return lambda step: then(max(0, step - steps))


def ramp(then: Schedule, steps: int, start: float) -> Schedule:
    """Rise in a straight line to the peak, in place of the first steps of another schedule.

    f(t) = start + (1 - start) t / steps for t < steps, and then(t) from there on.

    Args:
        then: Schedule that goes on.
        steps: Length of the ramp in optimizer steps, at least 0.
        start: Factor of the peak at step 0, in (0, 1].

    Returns:
        A function of the step.

    Source:
        ``warmup_prefix=False`` of the schedulers of timm.
    """
    rise = warm_up(constant(), steps, start)
    return lambda step: rise(step) if step < steps else then(step)


def by_epoch(then: Schedule, steps_per_epoch: int) -> Schedule:
    """Change at the beginning of an epoch only: f(t) = then(t - t mod steps_per_epoch).

    Args:
        then: Schedule that is looked at there.
        steps_per_epoch: Length of an epoch in optimizer steps, at least 1.

    Returns:
        A function of the step.
    """
    return lambda step: then(step - step % steps_per_epoch)


def build_schedule(config: ScheduleConfig, plan: Plan) -> Schedule:
    """Join the curve that a configuration names with its warm-up; the rate is peak_lr x factor.

    A curve of the user is checked over the whole run; see ``check_curve``.

    Args:
        config: Name and arguments of the curve; milestones are in epochs.
        plan: Lengths of the run, of an epoch and of the warm-up, in optimizer steps.

    Returns:
        A function of the step, to be multiplied with ``plan.peak_lr``.

    Raises:
        ConfigError: An argument lies outside its range, or a curve of the user fails.
    """
    length = plan.total_steps
    if plan.warmup == "shift":
        length = max(1, length - plan.warmup_steps)  # none is left where the run cuts the rise off
    if config.curve is None:
        return _join(_named(config, plan, length), plan)
    curve = build_curve(config.curve, plan, length)
    schedule = _join(curve, plan)
    check_curve(schedule, plan)
    return schedule


def _named(config: ScheduleConfig, plan: Plan, steps: int) -> Schedule:
    match config.name:
        case "constant":
            return constant()
        case "step":
            milestones = [step_of(milestone, plan) for milestone in config.milestones]
            return step_decay(milestones, config.gamma)
        case "cosine":
            return cosine(steps, config.final)
        case "linear":
            return linear(steps, config.final)
        case "polynomial":
            return polynomial(steps, config.power, config.final)
        case "one_cycle":
            return one_cycle(steps, config.peak_at, config.final)


def _join(curve: Schedule, plan: Plan) -> Schedule:
    """Put the warm-up before a curve, or on it, and let it change when the plan says."""
    if plan.warmup == "shift":
        curve = shifted(curve, plan.warmup_steps)
    join = ramp if plan.warmup == "replace" else warm_up
    return _paced(join(curve, plan.warmup_steps, plan.warmup_start), plan)


def _paced(schedule: Schedule, plan: Plan) -> Schedule:
    return by_epoch(schedule, plan.steps_per_epoch) if plan.by == "epoch" else schedule


def build_momentum(plan: Plan) -> Schedule | None:
    """Let momentum go from its first value to its last along the warm-up.

    With m0 and m these values, m(t) = m0 + (m - m0) t / warmup_steps, and m from there on.

    Args:
        plan: Both values, the length of the warm-up, and whether momentum changes by epoch.

    Returns:
        A function of the step; None if momentum does not change.
    """
    start = plan.momentum_start
    if start is None:
        return None
    steps = plan.warmup_steps
    return _paced(lambda step: _blend(start, plan.momentum, _part(step, steps)), plan)


def step_of(milestone: float, plan: Plan) -> int:
    """Return the step of the curve from which a milestone counts, which is given in epochs."""
    return round(milestone * plan.steps_per_epoch)


def _part(step: float, steps: float) -> float:
    """Part of a length that is behind, at most 1."""
    return min(1.0, step / steps)


def _half_cosine(part: float) -> float:
    """Rise from 0 to 1 along half a cosine; exact at both ends, and flat there."""
    return (1.0 - math.cos(math.pi * part)) / 2.0


def _blend(first: float, last: float, part: float) -> float:
    """Go from one value to another; exact at both ends, which first + (last - first) is not."""
    return (1.0 - part) * first + part * last


def _check_length(steps: int) -> None:
    _check(steps >= 1, "steps", steps, "a length of at least 1 step")


def _check_final(final: float) -> None:
    _check(0 <= final <= 1, "final", final, "a factor in [0, 1], such as 0.0")


def _check(holds: bool, key: str, value: float, remedy: str) -> None:  # noqa: FBT001
    if not holds:
        raise ConfigError(f"schedule.{key} is {value}; choose {remedy}.")
