"""The parts of a run, built from its description and checked against each other."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ddp_sgd.building import build
from ddp_sgd.checkpointing.reading import read_tensors
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.data.loading import EvalLoader, TrainLoader
from ddp_sgd.data.order import Chunks, Order
from ddp_sgd.distributed.collectives import broadcast_over_ranks
from ddp_sgd.distributed.pulse import Pulse
from ddp_sgd.distributed.replica import Replica
from ddp_sgd.distributed.replication import replicate
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.capture import describe_loss, velocities
from ddp_sgd.engine.evaluation import Metrics, Score, evaluate
from ddp_sgd.engine.restoring import (
    plan_from,
    refuse_misfit,
    restore,
    restore_velocities,
    share_other_state,
    state_from,
)
from ddp_sgd.engine.resume import Past
from ddp_sgd.engine.state import State
from ddp_sgd.engine.step import Stepper, model_generators
from ddp_sgd.engine.time_shares import TimeShares
from ddp_sgd.engine.trial import check_dataset, check_normalization, try_out
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.losses import LossFunction
from ddp_sgd.optim.schedule import Schedule, build_schedule
from ddp_sgd.optim.sgd import SGD, build_sgd
from ddp_sgd.plan import Plan
from ddp_sgd.seeds import seed_for


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the user brings: a model, a loss and data, on the host.

    Args:
        model: Module to train.
        loss: Module or function of (outputs, targets).
        train_set: Map-style data set of (input, target).
        eval_set: The same, held out; None trains without evaluation.
    """

    model: nn.Module
    loss: LossFunction
    train_set: Any
    eval_set: Any | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run that is ready to start.

    Args:
        plan: The run's arithmetic.
        replica: The model, equal on all ranks.
        stepper: Takes steps.
        loader: The training set, step by step.
        schedule: Factor of the peak rate for each step.
        score: Evaluates the model; gives nothing if there is no held-out set.
        seed_model: Seeds what the model draws in a step, such as dropout.
        optimizer: SGD over the replica's parameters.
        loss: What the loss is.
        device: Where this rank computes.
        state: Where the run stands.
        skip: Samples at the head of the next step that were trained already.
        pulse: What is being done, for those who watch.
        shares: Where the time goes.
    """

    plan: Plan
    replica: Replica
    stepper: Stepper
    loader: TrainLoader
    schedule: Schedule
    score: Score
    seed_model: Callable[[int], None]
    optimizer: SGD
    loss: str
    device: torch.device
    state: State
    skip: int
    pulse: Pulse
    shares: TimeShares

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.plan.peak_lr * self.schedule(step)


def gather_parts(
    config: RunConfig,
    model: nn.Module | None,
    loss: LossFunction | None,
    train_set: Any,
    eval_set: Any,
) -> Parts:
    """Take what is given, build the rest from the configuration.

    A given training set without a held-out set means that there is none.

    Raises:
        ConfigError: Something is of the wrong kind.
        DataError: A data set cannot be opened, or is empty.
    """
    if train_set is None:
        train_set = build(config.data.train, "data.train", failure=DataError)
        if eval_set is None and config.data.eval is not None:
            eval_set = build(config.data.eval, "data.eval", failure=DataError)
    check_dataset(train_set, "data.train")
    if eval_set is not None:
        check_dataset(eval_set, "data.eval")
    return Parts(
        model=ready_model(config, model),
        loss=ready_loss(config, loss),
        train_set=train_set,
        eval_set=eval_set,
    )


def ready_model(config: RunConfig, model: nn.Module | None = None) -> nn.Module:
    """Take the model that is given, or build the one of the configuration.

    Raises:
        ConfigError: It is no module.
    """
    # The weights follow from the seed alone: not from what the data sets drew before.
    torch.manual_seed(seed_for("weights", config.seed))
    model = build(config.model, "model") if model is None else model
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}; name a torch.nn.Module, or a function that "
            "returns one."
        )
    if not model.training:  # as pretrained models come; parts may stay frozen, the whole may not
        model.train()
    return model


def ready_loss(config: RunConfig, loss: LossFunction | None = None) -> LossFunction:
    """Take the loss that is given, or build the one of the configuration.

    Raises:
        ConfigError: It cannot be called, or is a class, whose call would make a loss.
    """
    loss = build(config.loss, "loss") if loss is None else loss
    if not callable(loss) or isinstance(loss, type):
        raise ConfigError(
            f"loss is a {type(loss).__name__}; name a module or function of (outputs, targets)."
        )
    return loss


def assemble(config: RunConfig, parts: Parts, runtime: Runtime, past: Past) -> Job:
    """Work out the plan and put the parts together, in the state that was saved.

    Raises:
        ConfigError: The parts do not fit together, or not to the plan.
        DataError: A sample cannot be read, labels lie out of range, or a checkpoint is damaged.
        RefusedError: The checkpoint is of another run.
    """
    samples, loss_name = len(parts.train_set), describe_loss(parts.loss)
    saved = read_tensors(past.file) if past.file else None
    if saved and past.header:
        refuse_misfit(past.header, saved, parts.model, samples=samples, loss=loss_name)
        restore(parts.model, saved)
    plan = plan_from(config, past.header, samples=samples, world_size=runtime.world_size)
    state, skip = state_from(past.header, plan)
    model = parts.model.to(runtime.device)
    if isinstance(parts.loss, nn.Module):
        parts.loss.to(runtime.device)
    check_normalization(model, plan)
    objective = try_out(model, parts.loss, parts.train_set, "data.train", runtime.device)
    optimizer = _optimizer(config, model)
    velocity_of = optimizer.velocities
    replica = replicate(model, runtime, config.parallel, plan, velocity_of)  # as on rank 0 now
    if saved:
        restore_velocities(model, optimizer, saved)
    if past.header:
        share_other_state(model, runtime)
        broadcast_over_ranks((buffer for _, buffer in velocities(model, optimizer)), runtime)
        replica.remember(saved.get("compression") if saved else None)
    pulse, clip_norm = Pulse(), config.optim.clip_norm
    return Job(
        plan=plan,
        replica=replica,
        stepper=Stepper(replica, objective, optimizer, runtime, pulse, clip_norm=clip_norm),
        loader=_train_loader(config, plan, parts.train_set, runtime),
        schedule=build_schedule(config.schedule, plan),
        score=_scorer(config, parts, replica, runtime, pulse),
        seed_model=_model_seeder(config.seed, runtime),
        optimizer=optimizer,
        loss=loss_name,
        device=runtime.device,
        state=state,
        skip=skip,
        pulse=pulse,
        shares=TimeShares(pulse, runtime, replica.meets_in),
    )


def _optimizer(config: RunConfig, model: nn.Module) -> SGD:
    return build_sgd(
        model,
        momentum=config.optim.momentum,
        nesterov=config.optim.nesterov,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
    )


def _train_loader(config: RunConfig, plan: Plan, dataset: Any, runtime: Runtime) -> TrainLoader:
    order = Order(
        plan.samples,
        global_batch=plan.global_batch,
        batch_size=plan.batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=config.seed,
        tail=plan.tail,
    )
    return TrainLoader(
        dataset, order, epochs=plan.epochs, workers=config.data.workers, device=runtime.device
    )


def _scorer(
    config: RunConfig, parts: Parts, replica: Replica, runtime: Runtime, pulse: Pulse
) -> Score:
    if parts.eval_set is None:
        return lambda _: {}
    inner_score = build_scorer(config, replica.inner, parts.loss, parts.eval_set, runtime, pulse)

    def score(interrupted: Callable[[], bool]) -> Metrics:
        replica.sync_buffers()
        return inner_score(interrupted)

    return score


def build_scorer(
    config: RunConfig,
    model: nn.Module,
    loss: LossFunction,
    eval_set: Any,
    runtime: Runtime,
    pulse: Pulse,
) -> Callable[..., Metrics]:
    """Make what scores a model on held-out data.

    Args:
        config: Description of the run.
        model: Module on the runtime's device, equal on all ranks.
        loss: Loss on that device.
        eval_set: Map-style data set of (input, target).
        runtime: This process.
        pulse: Is told of every chunk.

    Raises:
        ConfigError: Model, loss and samples do not fit together.
        DataError: The samples cannot be read, or labels lie out of range.
    """
    objective = try_out(model, loss, eval_set, "data.eval", runtime.device)
    chunks = Chunks(
        len(eval_set),
        batch_size=config.data.batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
    )
    loader = EvalLoader(
        eval_set, chunks, seed=config.seed, workers=config.data.workers, device=runtime.device
    )
    return partial(evaluate, model, objective, loader, runtime, pulse)


def _model_seeder(seed: int, runtime: Runtime) -> Callable[[int], None]:
    generators = model_generators(runtime.device)

    def seed_model(step: int) -> None:
        number = seed_for("model", seed, step, runtime.rank)
        for generator in generators:
            generator.manual_seed(number)

    return seed_model
