"""The parts of a run, built from its description and checked against each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ddp_sgd.checkpointing.reading import read_tensors
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.data.fetching import Collate
from ddp_sgd.data.loading import EvalLoader, TrainLoader
from ddp_sgd.data.order import Chunks, Order
from ddp_sgd.distributed.collectives import broadcast_over_ranks
from ddp_sgd.distributed.pulse import Pulse
from ddp_sgd.distributed.replica import Replica
from ddp_sgd.distributed.replication import replicate
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import TrainingBuffers, buffer_at, buffers_by_name
from ddp_sgd.engine.capture import velocities
from ddp_sgd.engine.components import Parts, mark_training_set
from ddp_sgd.engine.data_marks import Marks, refuse_other_data
from ddp_sgd.engine.evaluation import Metrics, Score, evaluate
from ddp_sgd.engine.normalization import check_normalization
from ddp_sgd.engine.restoring import (
    broadcast_state,
    plan_from,
    refuse_misfit,
    restore,
    restore_buffers,
    restore_velocities,
    state_from,
)
from ddp_sgd.engine.resume import Past
from ddp_sgd.engine.sample_batch import read_batch
from ddp_sgd.engine.sanity_check import TrainingFacts, check_evaluation, check_training
from ddp_sgd.engine.state import State
from ddp_sgd.engine.step import Stepper
from ddp_sgd.engine.time_shares import TimeShares
from ddp_sgd.losses import LossFunction, loss_modules
from ddp_sgd.optim.schedule import Schedule, build_schedule
from ddp_sgd.optim.sgd import SGD, build_sgd
from ddp_sgd.out_of_memory import Use, memory_for
from ddp_sgd.plan import Plan


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
        buffers: The buffers that steps change.
        loss_modules: Modules of the loss, by where they were found.
        notes: What the user should know, one line each.
        marks: Of the samples, for checkpoints.
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
    buffers: TrainingBuffers
    loss_modules: Mapping[str, nn.Module]
    notes: tuple[str, ...]
    marks: Marks

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.plan.peak_lr * self.schedule(step)


def assemble(
    config: RunConfig, parts: Parts, runtime: Runtime, past: Past, marks: Marks | None = None
) -> Job:
    """Work out the plan and put the parts together, in the state that was saved.

    Args:
        config: Description of the run.
        parts: What the user brings.
        runtime: This process.
        past: What the run goes on from.
        marks: Of the samples of today, from ``require_agreement``; None compares no samples.

    Raises:
        ConfigError: The parts do not fit together, or not to the plan.
        DataError: A sample cannot be read, labels lie out of range, or a checkpoint is damaged.
        RefusedError: The checkpoint is of another run.
    """
    saved = _restore_model(config, parts, past, marks or {})
    samples = len(parts.train_set)
    plan = plan_from(config, past.header, samples=samples, world_size=runtime.world_size)
    state, skip = state_from(past.header, plan)
    model, modules = _on_device(parts, runtime)
    if past.header:  # before the check, which has to find the same on every rank
        broadcast_state(model, runtime)
    check_normalization(model, plan, step=state.step, skip=skip, device=runtime.device)
    optimizer = _optimizer(config, model)
    size = config.data.batch_size
    batch = read_batch(parts.train_set, "data.train", batch_size=size, collate=parts.collate)
    facts = check_training(model, parts.loss, parts.train_set, batch, plan, runtime)
    velocity_of = optimizer.velocities
    if saved:
        restore_buffers(model, modules, facts.buffers, saved)
        restore_velocities(model, optimizer, saved)
    with memory_for(Use.MODEL):  # whose gradients need room, too
        replica = replicate(model, runtime, config.parallel, plan, velocity_of)  # as on rank 0 now
    others = map(buffer_at, buffers_by_name(modules).values())
    broadcast_over_ranks(others, runtime)
    if past.header:
        broadcast_over_ranks((buffer for _, buffer in velocities(model, optimizer)), runtime)
        replica.remember(saved.get("compression") if saved else None)
    pulse = Pulse()
    job = Job(
        plan=plan,
        replica=replica,
        stepper=_stepper(config, replica, facts, optimizer, runtime, pulse),
        loader=_train_loader(config, plan, parts, runtime),
        schedule=build_schedule(config.schedule, plan),
        score=_scorer(config, parts, replica, runtime, pulse),
        seed_model=partial(facts.randomness.seed_step, config.seed, rank=runtime.rank),
        optimizer=optimizer,
        loss=parts.loss_name,
        device=runtime.device,
        state=state,
        skip=skip,
        pulse=pulse,
        shares=TimeShares(pulse, runtime, (*replica.meets_in, "synchronizing buffers")),
        buffers=facts.buffers,
        loss_modules=modules,
        notes=facts.notes,
        marks=marks or {},
    )
    if config.data.workers:
        parts.files.close()
    return job


def _restore_model(
    config: RunConfig, parts: Parts, past: Past, marks: Marks
) -> Mapping[str, Any] | None:
    """Load the weights of the checkpoint that the run goes on from; returns all of its tensors."""
    if past.file is None or past.header is None:
        return None
    saved = read_tensors(past.file)
    samples = len(parts.train_set)
    refuse_misfit(past.header, saved, parts.model, samples=samples, loss=parts.loss_name)
    refuse_other_data(past, saved, marks, partial(mark_training_set, config, parts.train_set))
    restore(parts.model, saved)
    return saved


def _stepper(
    config: RunConfig,
    replica: Replica,
    facts: TrainingFacts,
    optimizer: SGD,
    runtime: Runtime,
    pulse: Pulse,
) -> Stepper:
    return Stepper(
        replica,
        facts.objective,
        optimizer,
        runtime,
        pulse,
        clip_norm=config.optim.clip_norm,
        buffers=facts.buffers,
    )


def _on_device(parts: Parts, runtime: Runtime) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Move the model, and the modules of the loss, to the device of this rank."""
    with memory_for(Use.MODEL):
        model = parts.model.to(runtime.device)
        modules = loss_modules(parts.loss, model)
        for module in modules.values():
            module.to(runtime.device)
    return model, modules


def _optimizer(config: RunConfig, model: nn.Module) -> SGD:
    with memory_for(Use.MOMENTUM):
        return build_sgd(
            model,
            momentum=config.optim.momentum,
            nesterov=config.optim.nesterov,
            weight_decay=config.optim.weight_decay,
            decay_norm_and_bias=config.optim.decay_norm_and_bias,
        )


def _train_loader(config: RunConfig, plan: Plan, parts: Parts, runtime: Runtime) -> TrainLoader:
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
        parts.train_set,
        order,
        epochs=plan.epochs,
        workers=config.data.workers,
        device=runtime.device,
        collate=parts.collate,
    )


def _scorer(
    config: RunConfig, parts: Parts, replica: Replica, runtime: Runtime, pulse: Pulse
) -> Score:
    if parts.eval_set is None:
        return lambda _: {}
    inner_score = build_scorer(
        config, replica.inner, parts.loss, parts.eval_set, runtime, pulse, parts.collate
    )

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
    collate: Collate | None = None,
) -> Callable[..., Metrics]:
    """Make what scores a model on held-out data.

    Args:
        config: Description of the run.
        model: Module on the runtime's device, equal on all ranks.
        loss: Loss on that device.
        eval_set: Map-style data set of (input, target).
        runtime: This process.
        pulse: Is told of every chunk.
        collate: Function from a list of samples to a batch; None: torch's default_collate.

    Raises:
        ConfigError: Model, loss and samples do not fit together.
        DataError: The samples cannot be read, or labels lie out of range.
    """
    batch_size = config.data.batch_size
    batch = read_batch(eval_set, "data.eval", batch_size=batch_size, collate=collate)
    facts = check_evaluation(model, loss, eval_set, batch, runtime)
    chunks = Chunks(
        len(eval_set),
        batch_size=batch_size,
        rank=runtime.rank,
        world_size=runtime.world_size,
        in_step=facts.communicates,
    )
    loader = EvalLoader(
        eval_set,
        chunks,
        seed=config.seed,
        workers=config.data.workers,
        device=runtime.device,
        collate=collate,
    )
    begin_chunk = partial(facts.begin_chunk, config.seed)
    score = partial(
        evaluate, model, facts.objective, loader, runtime, pulse, seed_chunk=begin_chunk
    )

    def score_without_trace(*interrupted: Callable[[], bool]) -> Metrics:
        facts.buffers.keep()
        try:
            with memory_for(Use.EVALUATION):
                return score(*interrupted)
        finally:
            facts.buffers.restore()

    return score_without_trace
