"""Rates: learning rate and momentum of each step, as numbers and on the device."""

import socket

import torch

from ddp_sgd.config import ComputeConfig, ScheduleConfig
from ddp_sgd.distributed.collectives import gather_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.context import TrainContext
from ddp_sgd.errors import ConfigError
from ddp_sgd.optim.schedule import Schedule, build_momentum, build_schedule
from ddp_sgd.optim.sgd import SGD, RateTable
from ddp_sgd.plan import Plan
from ddp_sgd.rank_differences import name_values

_DOUBLE = (torch.float64, torch.complex128)

_COMPARED = 1_000
"""Steps at which ranks compare a curve, at most."""


class Rates:
    """Learning rate and momentum of each step.

    Args:
        plan: The run's arithmetic.
        schedule: Factor of the peak rate for each step.
        momentum: Momentum for each step; None: it does not change.
        table: The rates on the device, if steps read them there.

    Attributes:
        table: The same.
    """

    def __init__(
        self, plan: Plan, schedule: Schedule, momentum: Schedule | None, table: RateTable | None
    ) -> None:
        self.table = table
        self._plan = plan
        self._schedule = schedule
        self._momentum = momentum

    def lr_at(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self._plan.peak_lr * self._schedule(step)

    def begin_step(self, step: int, lr: float, optimizer: SGD) -> float | torch.Tensor:
        """Set the momentum of a step, and return its rate as the kernel takes it.

        Args:
            step: Number of the step.
            lr: Rate of the step, as a number.
            optimizer: The optimizer that takes it.
        """
        if self._momentum is not None:
            optimizer.momentum = self._momentum(step)
        return lr if self.table is None else self.table.at(step)


def build_rates(context: TrainContext, config: ScheduleConfig, compute: ComputeConfig) -> Rates:
    """Work out the rates of a run; all ranks call this.

    Args:
        context: The run.
        config: Section ``schedule`` of the configuration.
        compute: Section ``compute``.

    Raises:
        ConfigError: An argument lies outside its range; or a curve of the user fails somewhere in
            the run, or differs between ranks.
    """
    plan = context.plan
    schedule = build_schedule(config, plan)
    if config.curve is not None:
        require_equal_curves(schedule, plan, context.runtime)
    table = _rate_table(context, schedule, compute)
    return Rates(plan, schedule, build_momentum(plan), table)


def require_equal_curves(schedule: Schedule, plan: Plan, runtime: Runtime) -> None:
    """Refuse a curve that differs between ranks, as one that reads a file of its host may do.

    Args:
        schedule: What this rank has.
        plan: The run's arithmetic.
        runtime: This process.

    Raises:
        ConfigError: Ranks differ at one of some 1,000 steps; equal on all ranks.
    """
    if runtime.alone:
        return
    steps = range(0, plan.total_steps, -(-plan.total_steps // _COMPARED))
    mine = socket.gethostname(), [schedule(step) for step in steps]
    hosts, factors = zip(*gather_over_ranks(mine, runtime), strict=True)
    for step, *values in zip(steps, *factors, strict=True):
        if len(set(values)) > 1:
            by_rank = {rank: str(value) for rank, value in enumerate(values)}
            raise ConfigError(
                f"schedule.curve, with the warm-up, is {name_values(by_rank, hosts)} at step "
                f"{step} of the run; work it out from the arguments alone."
            )


def _rate_table(
    context: TrainContext, schedule: Schedule, compute: ComputeConfig
) -> RateTable | None:
    """Make a table of rates where steps read them on the device; None: they take numbers."""
    plan, device = context.plan, context.runtime.device
    is_double = any(p.dtype in _DOUBLE for p in context.wrapper.inner.parameters())
    if is_double or (device.type != "cuda" and not compute.cuda_graphs):
        return None
    return RateTable(lambda step: plan.peak_lr * schedule(step), plan.total_steps, device)
