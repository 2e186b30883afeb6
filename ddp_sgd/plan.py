"""Plan: batch sizes, steps, learning rates and warm-up of a run, worked out once. No torch."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.config.sections import DataConfig, OptimConfig, ScheduleConfig
from ddp_sgd.errors import ConfigError, DataError


class OrderFacts(NamedTuple):
    """What an order of the samples reads in an epoch.

    Args:
        length: Positions, m, each of them a sample that is read.
        distinct: Different samples among them, at most n.
        repeated: How many of these are read more than once.
        digest: Of the order of the first epoch; empty for an order of this package.
    """

    length: int
    distinct: int
    repeated: int = 0
    digest: str = ""

    @classmethod
    def of_permutation(cls, samples: int) -> "OrderFacts":
        """Describe an order that has each sample once."""
        return cls(samples, samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Every derived number of a run. Batches and sizes are in samples, lengths in optimizer steps.

    Args:
        world_size: Ranks, W.
        samples: Length of the training set, n.
        batch_size: Samples of one rank in one micro-batch, b.
        accumulate: Micro-batches of one rank in a full step, A.
        global_batch: Samples of all ranks in a full step, G = W A b, unless a resume on other ranks
            kept an earlier one; then A is the most micro-batches of any rank.
        tail: ``exact`` trains the last, smaller batch of an epoch; ``drop`` leaves it out.
        order_length: Positions in the order of an epoch, m: n, unless ``data.order`` names a
            function that reads more or fewer.
        distinct_samples: Different samples among these.
        repeated_samples: Samples among these that are read more than once in an epoch.
        steps_per_epoch: ceil(m / G), or floor(m / G) if the tail is dropped.
        samples_per_epoch: Samples that an epoch trains: n, or steps_per_epoch x G.
        last_batch: Samples in the last step of an epoch; those of a full step if the run ends
            before.
        smallest_micro_batch: Fewest samples in any forward pass of any rank; 0 if a rank is ever
            empty.
        epochs: Passes over the data that the run begins; it may end in the middle of the last one.
        total_steps: Steps in the run.
        total_samples: Samples in the run.
        reference_batch: Samples a step that base_lr is quoted for.
        scale: k = global_batch / reference_batch.
        scaling: Rule that leads from base_lr to peak_lr.
        base_lr: Rate for reference_batch.
        peak_lr: Rate for global_batch.
        schedule: Name of the curve; the class_path of a user's own.
        by: ``step``, or ``epoch`` if the rate changes at the beginning of an epoch only.
        warmup: How the warm-up and the curve are joined: ``multiply``, ``shift`` or ``replace``.
        warmup_steps: Length of the warm-up.
        warmup_start: Factor of the peak rate at step 0, in (0, 1].
        momentum: m of SGD, in [0, 1).
        momentum_start: m at step 0, which goes to ``momentum`` along the warm-up; None: it does
            not change.
        samples_before: Samples beyond those of this plan's steps, which the run trained while it
            had another global batch.
        local_start: Steps after which ranks take steps of their own; None: they never do.
        local_period: Steps from one average of their weights to the next.
    """

    world_size: int
    samples: int
    batch_size: int
    accumulate: int
    global_batch: int
    tail: str
    order_length: int
    distinct_samples: int
    repeated_samples: int
    steps_per_epoch: int
    samples_per_epoch: int
    last_batch: int
    smallest_micro_batch: int
    epochs: int
    total_steps: int
    total_samples: int
    reference_batch: int
    scale: float
    scaling: str
    base_lr: float
    peak_lr: float
    schedule: str
    warmup_steps: int
    warmup_start: float
    by: str = "step"
    warmup: str = "multiply"
    momentum: float = 0.0
    momentum_start: float | None = None
    samples_before: int = 0
    local_start: int | None = None
    local_period: int = 1

    @property
    def passes(self) -> float:
        """Passes over the data in the run, a real number."""
        return self.total_samples / self.samples_per_epoch

    def epoch_at(self, step: int) -> float:
        """Passes over the data after ``step`` steps: samples seen / samples of an epoch."""
        return (self.samples_at(step) - self.samples_before) / self.samples_per_epoch

    def samples_at(self, step: int) -> int:
        """Samples that the run has trained after ``step`` steps."""
        epoch, position = self.place_at(step)
        return epoch * self.samples_per_epoch + position + self.samples_before

    def place_at(self, step: int) -> tuple[int, int]:
        """The epoch that the step with this number belongs to, and the samples of it before."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, step_in_epoch * self.global_batch

    def step_at(self, epoch: int, position: int) -> tuple[int, int]:
        """The step that trains the sample at a position of an epoch, and the samples of it before.

        Where the tail is dropped, positions in it belong to the next epoch's first step.
        """
        step, skip = divmod(position, self.global_batch)
        if step >= self.steps_per_epoch:
            return (epoch + 1) * self.steps_per_epoch, 0
        return epoch * self.steps_per_epoch + step, skip

    def ends_epochs(self, step: int, every: int) -> bool:
        """Whether ``step`` steps complete a multiple of ``every`` epochs, or the run."""
        return step % (every * self.steps_per_epoch) == 0 or step == self.total_steps

    def is_local(self, step: int) -> bool:
        """Whether ranks take the step with this number on their own."""
        return self.local_start is not None and step >= self.local_start

    def ranks_sync_at(self, step: int) -> bool:
        """Whether all ranks have the same weights after ``step`` steps."""
        return (
            step == 0
            or not self.is_local(step - 1)
            or step % self.local_period == 0
            or self.ends_epochs(step, 1)
        )

    def step_samples(self, step: int) -> int:
        """Samples that the step with this number trains, over all ranks and micro-batches."""
        return self.samples_at(step + 1) - self.samples_at(step)


def make_plan(
    config: RunConfig,
    *,
    samples: int,
    world_size: int,
    kept: tuple[int, int] | None = None,
    facts_of_order: Callable[[int], OrderFacts] | None = None,
) -> Plan:
    """Work out every derived number of a run.

    Args:
        config: Description of the run.
        samples: Length of the training set, n.
        world_size: Ranks, at least 1.
        kept: Global and reference batch of a run that goes on; None: those of the configuration.
        facts_of_order: What ``data.order`` reads, for a global batch; None: each sample once.

    Raises:
        DataError: The training set is empty.
        ConfigError: No step is left, since the global batch is larger than the data and the tail is
            dropped; the peak rate is too large, or too small, for a number; or momentum is to
            change along a warm-up, and there is none.
    """
    data, optim = config.data, config.optim
    global_batch, reference_batch = kept or _batches(config, world_size)
    read = facts_of_order(global_batch) if facts_of_order else OrderFacts.of_permutation(samples)
    steps_per_epoch, samples_per_epoch = _epoch(data, read.length, world_size, global_batch)
    total_steps = config.steps or config.epochs * steps_per_epoch
    epochs, rest = divmod(total_steps, steps_per_epoch)
    tail = samples_per_epoch - (steps_per_epoch - 1) * global_batch
    sizes = min(global_batch, samples_per_epoch), tail if epochs else global_batch
    scale = global_batch / reference_batch
    peak_lr = _peak_lr(optim, scale)
    local = config.parallel.local_sgd
    return Plan(
        world_size=world_size,
        samples=samples,
        batch_size=data.batch_size,
        accumulate=len(micro_batch_sizes(global_batch, 0, world_size, data.batch_size)) or 1,
        global_batch=global_batch,
        tail=data.tail,
        order_length=read.length,
        distinct_samples=read.distinct,
        repeated_samples=read.repeated,
        steps_per_epoch=steps_per_epoch,
        samples_per_epoch=samples_per_epoch,
        last_batch=sizes[1],
        smallest_micro_batch=_smallest_micro_batch(sizes, world_size, data.batch_size),
        epochs=epochs + (rest > 0),
        total_steps=total_steps,
        total_samples=epochs * samples_per_epoch + rest * global_batch,
        reference_batch=reference_batch,
        scale=scale,
        scaling=optim.scaling,
        base_lr=optim.lr,
        peak_lr=peak_lr,
        **_schedule(config, total_steps, steps_per_epoch, scale, peak_lr),
        local_start=local.start_step if world_size > 1 else None,
        local_period=local.period,
    )


def _batches(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Global batch and reference batch that follow from the configuration."""
    rank_batch = config.data.accumulate * config.data.batch_size
    return world_size * rank_batch, config.optim.reference_batch or rank_batch


def micro_batch_sizes(
    step_samples: int, rank: int, world_size: int, batch_size: int
) -> tuple[int, ...]:
    """Sizes of one rank's micro-batches in a step.

    The rank owns every ``world_size``-th of the step's samples, from number ``rank`` on, in pieces
    of at most ``batch_size``; there are none if the step has too few samples to reach it.
    """
    share = (step_samples - rank + world_size - 1) // world_size
    return tuple(_pieces(share, batch_size))


def _pieces(total: int, most: int) -> Iterator[int]:
    while total > 0:
        yield min(total, most)
        total -= most


def _epoch(data: DataConfig, samples: int, world_size: int, global_batch: int) -> tuple[int, int]:
    """Steps and samples of an epoch."""
    if samples < 1:
        raise DataError("data.train is empty; name a data set with at least one sample.")
    if data.tail == "exact":
        return -(-samples // global_batch), samples
    if samples >= global_batch:
        return samples // global_batch, samples // global_batch * global_batch
    fitting = samples // (world_size * data.accumulate)
    smaller = f"data.batch_size={fitting} or less" if fitting else "use fewer ranks"
    raise ConfigError(
        f"data.tail is drop while the global batch is {global_batch} of {samples} samples, so that "
        f"no step is left; set data.tail=exact, or {smaller}."
    )


def _smallest_micro_batch(steps: Iterable[int], world_size: int, batch_size: int) -> int:
    """Look at the first and the last rank: the shares of all others equal one of theirs."""
    return min(
        size
        for step_samples in steps
        for rank in (0, world_size - 1)
        for size in micro_batch_sizes(step_samples, rank, world_size, batch_size) or (0,)
    )


def _peak_lr(optim: OptimConfig, scale: float) -> float:
    factor = {"linear": scale, "sqrt": math.sqrt(scale), "none": 1.0}[optim.scaling]
    peak = optim.lr * factor
    if not 0 < peak < math.inf:
        raise ConfigError(
            f"optim.lr is {optim.lr}, which the rule {optim.scaling} takes to {peak} at k = "
            f"{scale:.6g}; choose a rate nearer to 0.1."
        )
    return peak


def _schedule(
    config: RunConfig, total_steps: int, steps_per_epoch: int, scale: float, peak_lr: float
) -> dict[str, Any]:
    """Fields of the plan that follow from the section ``schedule``, and momentum."""
    schedule = config.schedule
    start = schedule.warmup_start
    return {
        "schedule": schedule.curve.class_path if schedule.curve else schedule.name,
        "by": schedule.by,
        "warmup": schedule.warmup,
        "warmup_steps": _warmup_steps(schedule, total_steps, steps_per_epoch, scale),
        "warmup_start": min(1.0, config.optim.lr / peak_lr) if start == "auto" else start,
        "momentum": config.optim.momentum,
        "momentum_start": schedule.momentum_start,
    }


def _warmup_steps(
    schedule: ScheduleConfig, total_steps: int, steps_per_epoch: int, scale: float
) -> int:
    steps = schedule.warmup_steps
    if steps is None:
        has_own_rise = schedule.name == "one_cycle" or schedule.curve is not None
        auto = 0.0 if scale <= 1 or has_own_rise else min(5.0, total_steps / steps_per_epoch / 10)
        epochs = auto if schedule.warmup_epochs == "auto" else schedule.warmup_epochs
        steps = round(epochs * steps_per_epoch)
    if steps == 0 and schedule.momentum_start is not None:
        raise ConfigError(
            f"schedule.momentum_start is {schedule.momentum_start} while the run has no warm-up; "
            "set schedule.warmup_epochs=3 or so."
        )
    return steps
