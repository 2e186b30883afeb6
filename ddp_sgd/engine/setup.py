"""Setup of a run: components become a context that is ready to train."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ddp_sgd.checkpointing.serialization import read_tensors
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.data.fetcher import Collate
from ddp_sgd.data.loader import EvalLoader, TrainLoader
from ddp_sgd.data.sampler import EvalSampler, TrainSampler
from ddp_sgd.distributed.collectives import broadcast_over_ranks
from ddp_sgd.distributed.data_parallel import DataParallelModel
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.replication import wrap_model
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import TrainingBuffers, buffer_at, buffers_by_name
from ddp_sgd.engine.components import Components, read_batch
from ddp_sgd.engine.evaluation import Metrics, Score, evaluate
from ddp_sgd.engine.model_check import check_normalization
from ddp_sgd.engine.rank_consistency import Marks, mark_training_set
from ddp_sgd.engine.resume import ResumePoint, plan_from, refuse_other_data, state_from
from ddp_sgd.engine.sanity_check import TrainingFacts, check_evaluation, check_training
from ddp_sgd.engine.step import Stepper
from ddp_sgd.engine.sync import TimeShares
from ddp_sgd.engine.train_state import (
    State,
    broadcast_state,
    momentum_buffers,
    refuse_misfit,
    restore,
    restore_buffers,
    restore_momentum_buffers,
)
from ddp_sgd.losses import LossFunction, loss_modules
from ddp_sgd.optim.sgd import SGD, build_sgd
from ddp_sgd.plan import Plan
from ddp_sgd.seeds import Randomness
from ddp_sgd.torch_errors import Use, memory_for


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainContext:
    """A run that is ready to start.

    Args:
        plan: The run's arithmetic.
        wrapper: The model, equal on all ranks.
        stepper: Takes steps.
        loader: The training set, step by step.
        score: Evaluates the model; gives nothing if there is no held-out set.
        randomness: The generators that steps draw from, such as for dropout.
        optimizer: SGD over the model's parameters.
        loss: What the loss is.
        device: Where this rank computes.
        state: Where the run stands.
        skip: Samples at the head of the next step that were trained already.
        progress: What is being done, for those who watch.
        shares: Where the time goes.
        buffers: The buffers that steps change.
        loss_modules: Modules of the loss, by where they were found.
        notes: What the user should know, one line each.
        marks: Of the samples, for checkpoints.
    """

    plan: Plan
    wrapper: DataParallelModel
    stepper: Stepper
    loader: TrainLoader
    score: Score
    randomness: Randomness
    optimizer: SGD
    loss: str
    device: torch.device
    state: State
    skip: int
    progress: ProgressTracker
    shares: TimeShares
    buffers: TrainingBuffers
    loss_modules: Mapping[str, nn.Module]
    notes: tuple[str, ...]
    marks: Marks


def build_context(
    config: RunConfig,
    components: Components,
    runtime: Runtime,
    resume_point: ResumePoint,
    marks: Marks | None = None,
) -> TrainContext:
    """Work out the plan and put the components together, in the state that was saved.

    Args:
        config: Description of the run.
        components: What the user brings.
        runtime: This process.
        resume_point: What the run goes on from.
        marks: Of the samples of today, from ``require_consistency``; None compares no samples.

    Raises:
        ConfigError: The components do not fit together, or not to the plan.
        DataError: A sample cannot be read, labels lie out of range, or a checkpoint is damaged.
        RefusedError: The checkpoint is of another run.
    """
    saved = _restore_model(config, components, resume_point, marks or {})
    samples = len(components.train_set)
    plan = plan_from(config, resume_point.header, samples=samples, world_size=runtime.world_size)
    state, skip = state_from(resume_point.header, plan)
    model, modules = _on_device(components, runtime)
    if resume_point.header:  # before the check, which has to find the same on every rank
        broadcast_state(model, runtime)
    check_normalization(model, plan, step=state.step, skip=skip, device=runtime.device)
    optimizer = _optimizer(config, model)
    size = config.data.batch_size
    batch = read_batch(
        components.train_set, "data.train", batch_size=size, collate=components.collate
    )
    facts = check_training(model, components.loss, components.train_set, batch, plan, runtime)
    momentum_buffer_of = optimizer.momentum_buffers
    if saved:
        restore_buffers(model, modules, facts.buffers, saved)
        restore_momentum_buffers(model, optimizer, saved)
    with memory_for(Use.MODEL):  # whose gradients need room, too
        wrapper = wrap_model(
            model, runtime, config.parallel, plan, momentum_buffer_of
        )  # as on rank 0 now
    others = map(buffer_at, buffers_by_name(modules).values())
    broadcast_over_ranks(others, runtime)
    if resume_point.header:
        broadcast_over_ranks((buffer for _, buffer in momentum_buffers(model, optimizer)), runtime)
        wrapper.load_state_dict(saved.get("compression") if saved else None)
    progress = ProgressTracker()
    context = TrainContext(
        plan=plan,
        wrapper=wrapper,
        stepper=_stepper(config, wrapper, facts, optimizer, runtime, progress),
        loader=_train_loader(config, plan, components, runtime),
        score=_scorer(config, components, wrapper, runtime, progress),
        randomness=facts.randomness,
        optimizer=optimizer,
        loss=components.loss_name,
        device=runtime.device,
        state=state,
        skip=skip,
        progress=progress,
        shares=TimeShares(progress, runtime, (*wrapper.meets_in, Phase.BUFFERS)),
        buffers=facts.buffers,
        loss_modules=modules,
        notes=facts.notes,
        marks=marks or {},
    )
    if config.data.workers:
        components.files.close()
    return context


def _restore_model(
    config: RunConfig, components: Components, resume_point: ResumePoint, marks: Marks
) -> Mapping[str, Any] | None:
    """Load the weights of the checkpoint that the run goes on from; returns all of its tensors."""
    if resume_point.file is None or resume_point.header is None:
        return None
    saved = read_tensors(resume_point.file)
    samples = len(components.train_set)
    refuse_misfit(
        resume_point.header, saved, components.model, samples=samples, loss=components.loss_name
    )
    refuse_other_data(
        resume_point, saved, marks, partial(mark_training_set, config, components.train_set)
    )
    restore(components.model, saved)
    return saved


def _stepper(
    config: RunConfig,
    wrapper: DataParallelModel,
    facts: TrainingFacts,
    optimizer: SGD,
    runtime: Runtime,
    progress: ProgressTracker,
) -> Stepper:
    return Stepper(
        wrapper,
        facts.objective,
        optimizer,
        runtime,
        progress,
        clip_norm=config.optim.clip_norm,
        buffers=facts.buffers,
    )


def _on_device(components: Components, runtime: Runtime) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Move the model, and the modules of the loss, to the device of this rank."""
    with memory_for(Use.MODEL):
        model = components.model.to(runtime.device)
        modules = loss_modules(components.loss, model)
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


def _train_loader(
    config: RunConfig, plan: Plan, components: Components, runtime: Runtime
) -> TrainLoader:
    order = TrainSampler(
        plan.samples,
        global_batch=plan.global_batch,
        batch_size=plan.batch_size,
        seed=config.seed,
        tail=plan.tail,
        **runtime.shard,
    )
    return TrainLoader(
        components.train_set,
        order,
        epochs=plan.epochs,
        workers=config.data.workers,
        device=runtime.device,
        collate=components.collate,
    )


def _scorer(
    config: RunConfig,
    components: Components,
    wrapper: DataParallelModel,
    runtime: Runtime,
    progress: ProgressTracker,
) -> Score:
    if components.eval_set is None:
        return lambda _: {}
    inner_score = build_scorer(
        config,
        wrapper.inner,
        components.loss,
        components.eval_set,
        runtime,
        progress,
        components.collate,
    )

    def score(interrupted: Callable[[], bool]) -> Metrics:
        wrapper.sync_buffers()
        return inner_score(interrupted)

    return score


def build_scorer(
    config: RunConfig,
    model: nn.Module,
    loss: LossFunction,
    eval_set: Any,
    runtime: Runtime,
    progress: ProgressTracker,
    collate: Collate | None = None,
) -> Callable[..., Metrics]:
    """Make what scores a model on held-out data.

    Args:
        config: Description of the run.
        model: Module on the runtime's device, equal on all ranks.
        loss: Loss on that device.
        eval_set: Map-style data set of (input, target).
        runtime: This process.
        progress: Is told of every chunk.
        collate: Function from a list of samples to a batch; None: torch's default_collate.

    Raises:
        ConfigError: Model, loss and samples do not fit together.
        DataError: The samples cannot be read, or labels lie out of range.
    """
    batch_size = config.data.batch_size
    batch = read_batch(eval_set, "data.eval", batch_size=batch_size, collate=collate)
    facts = check_evaluation(model, loss, eval_set, batch, runtime)
    chunks = EvalSampler(
        len(eval_set),
        batch_size=batch_size,
        in_step=facts.communicates,
        **runtime.shard,
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
        evaluate, model, facts.objective, loader, runtime, progress, seed_chunk=begin_chunk
    )

    def score_without_trace(*interrupted: Callable[[], bool]) -> Metrics:
        facts.buffers.keep()
        try:
            with memory_for(Use.EVALUATION):
                return score(*interrupted)
        finally:
            facts.buffers.restore()

    return score_without_trace
