"""Setup of a run: components become a context that is ready to train."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ddp_sgd.checkpointing.serialization import read_tensors
from ddp_sgd.checkpointing.store import Header
from ddp_sgd.config import ComputeConfig, OptimConfig, ParallelConfig
from ddp_sgd.data.loader import EvalLoader, TrainLoader
from ddp_sgd.data.sampler import EvalSampler, TrainSampler
from ddp_sgd.distributed.collectives import broadcast_over_ranks
from ddp_sgd.distributed.data_parallel import DataParallelModel, wrap_model
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import TrainingBuffers, buffer_at, buffers_by_name
from ddp_sgd.engine.components import Components, read_sample_batch
from ddp_sgd.engine.evaluation import Metrics, Score, evaluate
from ddp_sgd.engine.model_check import check_normalization
from ddp_sgd.engine.precision import LossScale, Numerics
from ddp_sgd.engine.rank_consistency import Identity, mark_training_set
from ddp_sgd.engine.reading import Reading, place_arrays
from ddp_sgd.engine.resume import MARKS, ResumePoint, refuse_other_data, state_from
from ddp_sgd.engine.sanity_check import TrainingFacts, check_evaluation, check_training
from ddp_sgd.engine.step import Stepper, StepTaker
from ddp_sgd.engine.sync import TimeShares
from ddp_sgd.engine.train_state import (
    State,
    Tree,
    broadcast_state,
    other_state_dict,
    refuse_misfit,
    restore,
    restore_buffers,
    run_state_dict,
)
from ddp_sgd.errors import Use, memory_for
from ddp_sgd.losses import LossFunction, Objective, loss_modules
from ddp_sgd.optim.sgd import SGD, build_sgd
from ddp_sgd.plan import Plan
from ddp_sgd.seeds import Randomness


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainContext:
    """A run that is ready to start; its ``state_dict`` is what a checkpoint holds.

    Args:
        plan: The run's arithmetic.
        runtime: This process.
        wrapper: The model, equal on all ranks.
        stepper: Takes steps.
        objective: What is minimized.
        loader: The training set, step by step.
        score: Evaluates the model; gives nothing if there is no held-out set.
        randomness: The generators that steps draw from, such as for dropout.
        optimizer: SGD over the model's parameters.
        state: Where the run stands.
        skip: Samples at the head of the next step that were trained already.
        progress: What is being done, for those who watch.
        shares: Where the time goes.
        buffers: The buffers that steps change.
        loss_modules: Modules of the loss, by where they were found.
        notes: What the user should know, one line each.
        identity: What the run is, for checkpoints.
    """

    plan: Plan
    runtime: Runtime
    wrapper: DataParallelModel
    stepper: StepTaker
    objective: Objective
    loader: TrainLoader
    score: Score
    randomness: Randomness
    optimizer: SGD
    state: State
    skip: int
    progress: ProgressTracker
    shares: TimeShares
    buffers: TrainingBuffers
    loss_modules: Mapping[str, nn.Module]
    notes: tuple[str, ...]
    identity: Identity

    def state_dict(self) -> tuple[Header, Tree]:
        """Gather all that a resume needs; all ranks call this after the same step.

        Returns:
            The header, and the tensors where they are; whole on rank 0.
        """
        model, identity = self.wrapper.inner, self.identity
        loss_scale = self.stepper.loss_scale
        header, tree = run_state_dict(
            self.state,
            model=model,
            optimizer=self.optimizer,
            plan=self.plan,
            config=identity.config,
            run_id=identity.run_id,
            loss=identity.loss,
        )
        others = {
            **other_state_dict(model, self.loss_modules, self.buffers),
            MARKS: {name: tuple(mark) for name, mark in identity.marks.items()},
            "compression": self.wrapper.state_dict(),
            "loss_scale": loss_scale.state_dict() if loss_scale else {},
        }
        return header, {**tree, **{key: value for key, value in others.items() if value}}

    def load_state_dict(self, saved: Tree | None) -> None:
        """Put back all but the weights, which were loaded before; all ranks call this.

        Args:
            saved: Content of the checkpoint, on rank 0; elsewhere None.
        """
        if saved:
            restore_buffers(self.wrapper.inner, self.loss_modules, self.buffers, saved)
            self.optimizer.load_state_dict(saved["optimizer"])
        self.wrapper.sync_buffers()
        _broadcast_buffers(self.loss_modules, self.runtime)
        momentum = self.optimizer.state_dict()["momentum_buffer"].values()
        broadcast_over_ranks(momentum, self.runtime)
        self.wrapper.load_state_dict(saved.get("compression") if saved else None)
        if loss_scale := self.stepper.loss_scale:
            loss_scale.load_state_dict(saved.get("loss_scale") if saved else None, self.runtime)


def build_context(  # noqa: PLR0913  # a section for each part of the run
    components: Components,
    plan: Plan,
    runtime: Runtime,
    resume_point: ResumePoint,
    identity: Identity,
    *,
    optim: OptimConfig,
    parallel: ParallelConfig,
    compute: ComputeConfig,
) -> TrainContext:
    """Put the components together, in the state that was saved.

    Args:
        components: What the user brings.
        plan: The run's arithmetic.
        runtime: This process.
        resume_point: What the run goes on from.
        identity: What the run is.
        optim: Section of the configuration, as are ``parallel`` and ``compute``.
        parallel: See ``optim``.
        compute: See ``optim``.

    Raises:
        ConfigError: The components do not fit together, or not to the plan.
        DataError: A sample cannot be read, labels lie out of range, or a checkpoint is damaged.
        RefusedError: The checkpoint is of another run.
    """
    state, skip = state_from(resume_point.header, plan)
    numerics = Numerics(compute, runtime.device)
    model, modules, saved = _ready_model(components, resume_point, identity, numerics, runtime)
    check_normalization(model, plan, step=state.step, skip=skip, device=runtime.device)
    optimizer = _optimizer(optim, model)
    facts = _check_training(components, model, plan, runtime, numerics)
    momentum, captured = optimizer.momentum_buffers, compute.cuda_graphs
    with memory_for(Use.MODEL):  # whose gradients need room, too
        wrapper = wrap_model(model, runtime, parallel, plan, momentum, captured=captured)
    progress = ProgressTracker()
    stepper = _stepper(optim, wrapper, facts, optimizer, runtime, progress, numerics)
    context = TrainContext(
        plan=plan,
        runtime=runtime,
        wrapper=wrapper,
        objective=facts.objective,
        stepper=stepper,
        loader=_train_loader(components, plan, runtime),
        score=_scorer(components, wrapper, runtime, progress, numerics),
        randomness=facts.randomness,
        optimizer=optimizer,
        state=state,
        skip=skip,
        progress=progress,
        shares=TimeShares(progress, runtime, (*wrapper.meets_in, Phase.BUFFERS)),
        buffers=facts.buffers,
        loss_modules=modules,
        notes=(*numerics.check_parameters(model), *facts.notes),
        identity=identity,
    )
    _load_or_broadcast(context, saved, resume_point)
    if components.reading.workers:
        components.files.close()
    return context


def _stepper(
    optim: OptimConfig,
    wrapper: DataParallelModel,
    facts: TrainingFacts,
    optimizer: SGD,
    runtime: Runtime,
    progress: ProgressTracker,
    numerics: Numerics,
) -> Stepper:
    return Stepper(
        wrapper,
        facts.objective,
        optimizer,
        runtime,
        progress,
        clip_norm=optim.clip_norm,
        buffers=facts.buffers,
        loss_scale=LossScale(runtime.device) if numerics.scales_loss else None,
    )


def _load_or_broadcast(context: TrainContext, saved: Tree | None, point: ResumePoint) -> None:
    """Go on from what was saved, or begin with the loss of rank 0."""
    if point.header is not None:
        context.load_state_dict(saved)
    else:
        _broadcast_buffers(context.loss_modules, context.runtime)


def _ready_model(
    components: Components,
    resume_point: ResumePoint,
    identity: Identity,
    numerics: Numerics,
    runtime: Runtime,
) -> tuple[nn.Module, dict[str, nn.Module], Tree | None]:
    """Restore the model, if there is a checkpoint, and move it and the loss to the device.

    Returns:
        The model, the modules of the loss, and all tensors of the checkpoint.
    """
    saved = _restore_model(components, resume_point, identity)
    model, modules = _on_device(components, numerics, runtime)
    if resume_point.header:  # before the check, which has to find the same on every rank
        broadcast_state(model, runtime)
    return model, modules, saved


def _restore_model(
    components: Components, resume_point: ResumePoint, identity: Identity
) -> Tree | None:
    """Load the weights of the checkpoint that the run goes on from; returns all of its tensors."""
    if resume_point.file is None or resume_point.header is None:
        return None
    saved = read_tensors(resume_point.file)
    refuse_misfit(
        resume_point.header,
        saved,
        components.model,
        samples=len(components.train_set),
        loss=components.loss_name,
    )
    read_again = partial(mark_training_set, components.train_set, components.reading)
    refuse_other_data(resume_point, saved, identity.marks, read_again)
    restore(components.model, saved)
    return saved


def _on_device(
    components: Components, numerics: Numerics, runtime: Runtime
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """Move the model, and the modules of the loss, to the device of this rank."""
    with memory_for(Use.MODEL):
        model = numerics.arrange(components.model.to(runtime.device))
        modules = loss_modules(components.loss, model)
        for module in modules.values():
            module.to(runtime.device)
    return model, modules


def _check_training(
    components: Components, model: nn.Module, plan: Plan, runtime: Runtime, numerics: Numerics
) -> TrainingFacts:
    train_set, reading = components.train_set, components.reading
    batch = read_sample_batch(train_set, "data.train", reading, runtime.device)
    return check_training(model, components.loss, train_set, batch, plan, runtime, numerics)


def _broadcast_buffers(modules: Mapping[str, nn.Module], runtime: Runtime) -> None:
    """Replace the buffers of some modules, such as those of the loss, by those of rank 0."""
    broadcast_over_ranks(map(buffer_at, buffers_by_name(modules).values()), runtime)


def _optimizer(optim: OptimConfig, model: nn.Module) -> SGD:
    with memory_for(Use.MOMENTUM):
        return build_sgd(
            model,
            momentum=optim.momentum,
            nesterov=optim.nesterov,
            weight_decay=optim.weight_decay,
            decay_norm_and_bias=optim.decay_norm_and_bias,
        )


def _train_loader(components: Components, plan: Plan, runtime: Runtime) -> TrainLoader:
    sampler = TrainSampler(
        plan.samples,
        global_batch=plan.global_batch,
        batch_size=plan.batch_size,
        seed=components.reading.seed,
        tail=plan.tail,
        **runtime.shard,
    )
    return TrainLoader(
        components.train_set,
        sampler,
        epochs=plan.epochs,
        workers=components.reading.workers,
        device=runtime.device,
        collate=components.reading.collate,
        transforms=components.reading.train_transforms,
        arrays=place_arrays(components.train_set, "data.train", components.reading, runtime),
    )


def _scorer(
    components: Components,
    wrapper: DataParallelModel,
    runtime: Runtime,
    progress: ProgressTracker,
    numerics: Numerics,
) -> Score:
    if components.eval_set is None:
        return lambda _: {}
    inner_score = build_scorer(
        wrapper.inner,
        components.loss,
        components.eval_set,
        components.reading,
        runtime,
        progress,
        numerics,
    )

    def score(interrupted: Callable[[], bool]) -> Metrics:
        wrapper.sync_buffers()
        return inner_score(interrupted)

    return score


def build_scorer(
    model: nn.Module,
    loss: LossFunction,
    eval_set: Any,
    reading: Reading,
    runtime: Runtime,
    progress: ProgressTracker,
    numerics: Numerics,
) -> Callable[..., Metrics]:
    """Make what scores a model on held-out data.

    Args:
        model: Module on the runtime's device, equal on all ranks.
        loss: Loss on that device.
        eval_set: Map-style data set of (input, target).
        reading: How samples are read.
        runtime: This process.
        progress: Updated at every chunk.
        numerics: Precision and memory format of the passes, which the model has already.

    Raises:
        ConfigError: Model, loss and samples do not fit together.
        DataError: The samples cannot be read, or labels lie out of range.
    """
    batch = read_sample_batch(eval_set, "data.eval", reading, runtime.device)
    facts = check_evaluation(model, loss, eval_set, batch, runtime, numerics)
    chunks = EvalSampler(
        len(eval_set), batch_size=reading.batch_size, in_step=facts.communicates, **runtime.shard
    )
    loader = EvalLoader(
        eval_set,
        chunks,
        seed=reading.seed,
        workers=reading.workers,
        device=runtime.device,
        collate=reading.collate,
        transforms=reading.eval_transforms,
        arrays=place_arrays(eval_set, "data.eval", reading, runtime),
    )
    begin_chunk = partial(facts.begin_chunk, reading.seed)
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
