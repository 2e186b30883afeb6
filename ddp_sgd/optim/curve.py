"""A user's curve of the learning rate: built, and checked over the whole run. No torch."""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, SupportsFloat

from ddp_sgd.config.component import Component
from ddp_sgd.config.faults import show
from ddp_sgd.errors import ConfigError
from ddp_sgd.instantiate import instantiate
from ddp_sgd.plan import Plan

_KEY = "schedule.curve"

_MOST_CHECKED = 100_000
"""Steps up to which every step of a run is checked: a tenth of a second for a short function."""

_EVENLY = 10_000
"""Steps of a longer run that are checked besides, evenly spread."""

_AT_THE_ENDS = 1_000
"""Steps at the beginning and at the end of a longer run that are all checked."""

_TWICE = 1_000
"""Steps that are looked at a second time, at most."""


class Curve:
    """A schedule by a function of the user, each value of which is checked.

    Args:
        call: Function of (step, steps_per_epoch, total_steps).
        steps_per_epoch: Steps of an epoch.
        total_steps: Length of the curve in optimizer steps, at least 1.
    """

    def __init__(
        self, call: Callable[[int, int, int], Any], steps_per_epoch: int, total_steps: int
    ) -> None:
        self._call = call
        self._steps_per_epoch = steps_per_epoch
        self._total_steps = total_steps

    def __call__(self, step: float) -> float:
        """Return the factor of the peak rate at a step.

        Args:
            step: Number of the step on the curve, from 0, a whole number.

        Raises:
            ConfigError: The function fails, or gives no finite number of at least 0.
        """
        number = int(step)
        try:
            value = self._call(number, self._steps_per_epoch, self._total_steps)
            factor = float(value) if isinstance(value, SupportsFloat) else math.nan
        except Exception as error:  # any error of a user's function
            raise ConfigError(
                f"{_KEY} raises {type(error).__name__}: {error}, {self.place_of(number)}; correct "
                "the function."
            ) from error
        if not 0 <= factor < math.inf:
            raise ConfigError(
                f"{_KEY} is {show(value)} {self.place_of(number)}; return a finite number of at "
                "least 0, the factor of the peak rate."
            )
        return factor

    def place_of(self, step: int) -> str:
        """Name the arguments of a call, for errors."""
        return (
            f"for step={step}, steps_per_epoch={self._steps_per_epoch}, "
            f"total_steps={self._total_steps}"
        )


def build_curve(component: Component, plan: Plan, total_steps: int) -> Curve:
    """Build the curve that a configuration names.

    Args:
        component: ``schedule.curve``.
        plan: The run's arithmetic.
        total_steps: Length of the curve in optimizer steps, at least 1.

    Raises:
        ConfigError: It cannot be built, or not be called.
    """
    call = instantiate(component, _KEY)
    if not callable(call) or isinstance(call, type):
        what = call.__name__ if isinstance(call, type) else type(call).__name__
        article = "the class" if isinstance(call, type) else "a"
        raise ConfigError(
            f"{_KEY} is {article} {what}; name a function of (step, steps_per_epoch, total_steps) "
            f"with {_KEY}.call=false, or an object that is called so."
        )
    return Curve(call, plan.steps_per_epoch, total_steps)


def check_curve(schedule: Callable[[float], float], plan: Plan) -> None:
    """Refuse a curve that fails somewhere in the run, or is no pure function of its arguments.

    It is evaluated as the run will do it: at every step of a run of up to 100,000 steps. Of a
    longer run these are the first step of each epoch, of at most 100,000, the first and the last
    1,000 steps, and 10,000 that are spread evenly. Some of them, at most 1,000, are evaluated a
    second time.

    Args:
        schedule: The curve, joined with the warm-up of the run.
        plan: The run's arithmetic.

    Raises:
        ConfigError: A value is no finite number of at least 0, is another one the second time, or
            all of them are 0.
    """
    steps = steps_to_check(plan.total_steps, plan.steps_per_epoch)
    factors = {step: schedule(step) for step in steps}
    for step in steps[:: -(len(steps) // _TWICE + 1)]:  # in the opposite order
        if (again := schedule(step)) != factors[step]:
            raise ConfigError(
                f"{_KEY} is not the same twice: at step {step} of the run the factor was "
                f"{factors[step]}, then {again}; work it out from the arguments alone."
            )
    if not any(factors.values()):
        raise ConfigError(
            f"{_KEY} is 0 at all {plan.total_steps} steps of the run, so that nothing is trained; "
            "return the factor of the peak rate, which is 1 at the peak."
        )


def steps_to_check(total_steps: int, steps_per_epoch: int) -> list[int]:
    """List the steps at which a curve is checked, in ascending order; see ``check_curve``.

    Args:
        total_steps: Steps of the run, at least 1.
        steps_per_epoch: Steps of an epoch, at least 1.
    """
    if total_steps <= _MOST_CHECKED:
        return list(range(total_steps))
    some = -(-total_steps // (steps_per_epoch * _MOST_CHECKED))  # 1 if there are not too many
    epochs = range(0, total_steps, some * steps_per_epoch)
    even = range(0, total_steps, -(-total_steps // _EVENLY))
    ends = chain(range(_AT_THE_ENDS), range(total_steps - _AT_THE_ENDS, total_steps))
    return sorted({*epochs, *even, *ends})
