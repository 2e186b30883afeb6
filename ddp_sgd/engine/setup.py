"""Setup of a run: components become a context that is ready to train."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypedDict

from torch import nn

from ddp_sgd.checkpointing.serialization import read_tensors
from ddp_sgd.config import ComputeConfig, OptimConfig, ParallelConfig
from ddp_sgd.data.loader import EvalLoader, TrainLoader
from ddp_sgd.data.order import name_order
from ddp_sgd.data.sampler import EvalSampler, TrainSampler
from ddp_sgd.distributed.data_parallel import DataParallelModel, wrap_model
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.components import Components, read_sample_batch
from ddp_sgd.engine.context import TrainContext, broadcast_buffers_of
from ddp_sgd.engine.evaluation import Metrics, Score, evaluate
from ddp_sgd.engine.model_check import check_normalization
from ddp_sgd.engine.precision import LossScale, Numerics
from ddp_sgd.engine.rank_consistency import Identity, mark_training_set
from ddp_sgd.engine.reading import Reading, place_arrays
from ddp_sgd.engine.resume import ResumePoint, refuse_other_data, state_from
from ddp_sgd.engine.sanity_check import TrainingFacts, check_evaluation, check_training
from ddp_sgd.engine.step import Stepper
from ddp_sgd.engine.sync import TimeShares
from ddp_sgd.engine.train_state import (
    Tree,
    broadcast_state,
    refuse_misfit,
    restore,
)
from ddp_sgd.errors import Use, memory_for
from ddp_sgd.losses import LossFunction, loss_modules
from ddp_sgd.optim.sgd import SGD, build_sgd
from ddp_sgd.plan import Plan
from ddp_sgd.scores import prefix_of


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
        optim: Section of the configuration, as are the next two.
        parallel: How the models of all ranks are kept equal.
        compute: How numbers are computed.

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
    wrapper = _wrapper(model, optimizer, plan, runtime, parallel, captured=compute.cuda_graphs)
    progress = ProgressTracker()
    stepper = _stepper(optim, wrapper, facts, optimizer, runtime, progress, numerics)
    context = TrainContext(
        plan=plan,
        runtime=runtime,
        wrapper=wrapper,
        objective=facts.objective,
        stepper=stepper,
        after_step=facts.after_step,
        loader=_train_loader(components, plan, runtime),
        **_scorers(components, wrapper, runtime, progress, numerics),
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
    components.close_before_fork()
    return context


def _wrapper(
    model: nn.Module,
    optimizer: SGD,
    plan: Plan,
    runtime: Runtime,
    parallel: ParallelConfig,
    *,
    captured: bool,
) -> DataParallelModel:
    momentum = optimizer.momentum_buffers
    with memory_for(Use.MODEL):  # whose gradients need room, too
        return wrap_model(model, runtime, parallel, plan, momentum, captured=captured)


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
        clip_value=optim.clip_value,
        buffers=facts.buffers,
        loss_scale=LossScale(runtime.device) if numerics.scales_loss else None,
    )


def _load_or_broadcast(context: TrainContext, saved: Tree | None, point: ResumePoint) -> None:
    """Go on from what was saved, or begin with the loss of rank 0."""
    if point.header is not None:
        context.load_state_dict(saved)
    else:
        broadcast_buffers_of(context.loss_modules, context.runtime)


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
        order=name_order(identity.config["data"]["order"]),
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
    parts = model, components.loss, train_set, batch, plan, runtime, numerics
    return check_training(*parts, counts_correct=components.counts_correct)


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
        order=components.order,
        **runtime.shard,
    )
    return TrainLoader(
        components.train_set,
        sampler,
        epochs=plan.epochs,
        total_steps=plan.total_steps,
        workers=components.reading.workers,
        device=runtime.device,
        collate=components.reading.collate,
        transforms=components.reading.train_transforms,
        selection=components.reading.selection,
        arrays=place_arrays(components.train_set, "data.train", components.reading, runtime),
    )


class _Scorers(TypedDict):
    """What scores the model, as ``TrainContext`` has it."""

    score: Score
    score_test: Score | None
    evaluates: bool


def _scorers(
    components: Components,
    wrapper: DataParallelModel,
    runtime: Runtime,
    progress: ProgressTracker,
    numerics: Numerics,
) -> _Scorers:
    """Make what scores the held-out sets, and what scores the test set."""
    score, score_test = (
        _scorer(components, wrapper, runtime, progress, numerics, sets)
        for sets in (components.eval_sets, components.test_sets)
    )
    evaluates = score is not None or score_test is not None
    return _Scorers(score=score or (lambda _: {}), score_test=score_test, evaluates=evaluates)


def _scorer(
    components: Components,
    wrapper: DataParallelModel,
    runtime: Runtime,
    progress: ProgressTracker,
    numerics: Numerics,
    sets: Mapping[str, Any],
) -> Score | None:
    """Make what scores some held-out sets, one after the other; None if there are none."""
    scorers = [
        build_scorer(
            *(wrapper.inner, components.loss, dataset, components.reading),
            *(runtime, progress, numerics),
            where=where,
        )
        for where, dataset in sets.items()
    ]

    def score(interrupted: Callable[[], bool]) -> Metrics:
        wrapper.sync_buffers()
        return {name: value for each in scorers for name, value in each(interrupted).items()}

    return score if scorers else None


def build_scorer(  # noqa: PLR0913  # a data set, and what scores it
    model: nn.Module,
    loss: LossFunction,
    eval_set: Any,
    reading: Reading,
    runtime: Runtime,
    progress: ProgressTracker,
    numerics: Numerics,
    *,
    where: str = "data.eval",
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
        where: Key of the data set, from which the names of its scores follow.

    Raises:
        ConfigError: Model, loss and samples do not fit together.
        DataError: The samples cannot be read, or labels lie out of range.
    """
    batch = read_sample_batch(eval_set, where, reading, runtime.device)
    facts = check_evaluation(model, loss, eval_set, batch, runtime, numerics, where=where)
    chunks = EvalSampler(
        len(eval_set), batch_size=reading.chunk_size, in_step=facts.communicates, **runtime.shard
    )
    loader = EvalLoader(
        eval_set,
        chunks,
        seed=reading.seed,
        workers=reading.workers,
        device=runtime.device,
        collate=reading.collate,
        transforms=reading.eval_transforms,
        selection=reading.selection,
        arrays=place_arrays(eval_set, where, reading, runtime),
        where=where,
    )
    begin_chunk = partial(facts.begin_chunk, reading.seed)
    score = partial(
        evaluate, model, facts.objective, loader, runtime, progress, seed_chunk=begin_chunk
    )

    def score_without_trace(*interrupted: Callable[[], bool]) -> Metrics:
        facts.buffers.keep()
        try:
            with memory_for(Use.EVALUATION):
                scores = score(*interrupted)
        finally:
            facts.buffers.restore()
        prefix = prefix_of(where)
        return {f"{prefix}{name.removeprefix('eval')}": v for name, v in scores.items()}

    return score_without_trace
