"""``fit``: the whole run, from the configuration to the result.

The training loop: step, sync, evaluation, checkpoint.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn

from ddp_sgd.checkpointing.checkpointer import Checkpointer, open_checkpointer
from ddp_sgd.checkpointing.store import SkippedSteps
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.data.loader import StepBatches
from ddp_sgd.data.order import build_order
from ddp_sgd.distributed.error_propagation import end_process, propagate_errors
from ddp_sgd.distributed.hang_watch import watch_for_hangs
from ddp_sgd.distributed.progress import Phase
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.captured_step import capture_step
from ddp_sgd.engine.compilation import CACHE_NAME, compiled
from ddp_sgd.engine.components import Given, gather_components
from ddp_sgd.engine.context import TrainContext
from ddp_sgd.engine.evaluation import Interrupted
from ddp_sgd.engine.final_test import score_test_set
from ddp_sgd.engine.finished_run import lacks_test, repeat_result
from ddp_sgd.engine.order_check import refuse_other_order, require_equal_orders
from ddp_sgd.engine.precision import torch_settings
from ddp_sgd.engine.rank_consistency import Identity, require_consistency
from ddp_sgd.engine.rates import Rates, build_rates
from ddp_sgd.engine.reading import build_reading
from ddp_sgd.engine.result import RunResult, build_result
from ddp_sgd.engine.resume import (
    ResumePoint,
    find_resume_point,
    plan_from,
)
from ddp_sgd.engine.setup import build_context
from ddp_sgd.engine.sync import RankSync, SyncResult
from ddp_sgd.engine.triggers import Deadline, HasReason, StopRequest, Timetable, stop_on_signal
from ddp_sgd.errors import DivergedError, translate_errors
from ddp_sgd.losses import LossFunction
from ddp_sgd.report.reporter import Reporter, open_report
from ddp_sgd.report.run_folder import RunFolder, claim_run_folder

_PATIENCE = 10
"""Steps in a row without a finite gradient that end a run."""


class Loop:
    """Takes a run from where it stands to its end, or to a stop request.

    Args:
        context: The run; its state moves.
        rates: Learning rate and momentum of each step.
        seed_for_step: Seed of what the model draws in a step, on this rank.
        timetable: When the model is scored; receives how long saves and evaluations take.
        rank_sync: The periodic all-reduce besides that of gradients.
        checkpointer: Saves the state.
        report: Where measurements go.
    """

    def __init__(
        self,
        context: TrainContext,
        rates: Rates,
        seed_for_step: Callable[[int], int],
        timetable: Timetable,
        rank_sync: RankSync,
        checkpointer: Checkpointer,
        report: Reporter,
    ) -> None:
        self._context = context
        self._rates = rates
        self._seed_for_step = seed_for_step
        self._timetable = timetable
        self._rank_sync = rank_sync
        self._checkpointer = checkpointer
        self._report = report

    def run(self) -> None:
        """Take steps; whether they end or fail, the state is saved at the last one.

        Raises:
            DivergedError: Gradients stay non-finite.
            OutputError: The state cannot be saved.
        """
        context, state = self._context, self._context.state
        context.progress.enter(Phase.DATA, state.step)
        scored_before = state.scored_at
        go_on = self._score_if_due()  # the run may have been stopped just before
        if state.scored_at != scored_before:  # it may be the best, and must not be forgotten
            self._save()
        for batches in context.loader.from_step(state.step, context.skip) if go_on else ():
            synced = self._take_step(batches)
            go_on = not self._is_to_stop(synced) and self._score_if_due()
            if not go_on or (synced and synced.save):
                self._save()
            if not go_on:
                break
            context.progress.enter(Phase.DATA, state.step)
        if not go_on:
            self._report.stop(self._rank_sync.reason)
        context.progress.enter(Phase.SAVE)
        self._checkpointer.finish()

    def _save(self) -> None:
        self._context.progress.enter(Phase.SAVE)
        self._checkpointer.save(*self._context.state_dict())

    def _take_step(self, batches: StepBatches) -> SyncResult | None:
        """Take a step, and log what the ranks have synchronized, if it was time."""
        context, state = self._context, self._context.state
        lr = self._rates.lr_at(state.step)
        context.randomness.seed(self._seed_for_step(state.step))
        rate = self._rates.begin_step(state.step, lr, context.optimizer)
        result = context.stepper.step(batches, rate)
        state.step += 1
        if context.after_step is not None:
            context.after_step(state.step, result)
        if context.runtime.device.type != "cpu":
            context.progress.enter(Phase.DATA)
            context.loader.read_ahead()  # while the device computes
        context.progress.enter(Phase.SYNC)
        synced = self._rank_sync.after(state.step, result, lr=lr)
        if synced:
            state.skipped = synced.skipped
            self._report.train(synced.row)
            refuse_divergence(synced.skipped, lr)
            self._checkpointer.poll()
            self._timetable.deadline.save_s = self._checkpointer.save_s
        return synced

    def _is_to_stop(self, synced: SyncResult | None) -> bool:
        return (
            bool(synced and synced.stop)
            and self._context.state.step < self._context.plan.total_steps
        )

    def _score_if_due(self) -> bool:
        """Score where the timetable says; False if a stop request cut that short, on any rank."""
        context, state = self._context, self._context.state
        if not self._timetable.score_is_due_at(state.step) or state.scored_at == state.step:
            return True

        def is_unwanted() -> bool:
            return self._rank_sync.reason is not None and state.step < context.plan.total_steps

        context.progress.enter(Phase.EVALUATE, state.step)
        start = time.perf_counter()
        try:
            state.scores, state.scored_at = context.score(is_unwanted), state.step
        except Interrupted:
            return False
        self._report.eval(state.scores)
        self._timetable.deadline.score_s = time.perf_counter() - start
        return True


def fit(  # noqa: PLR0913  # what a user brings, by name
    config: RunConfig,
    runtime: Runtime,
    *,
    model: nn.Module | None = None,
    train_set: Any = None,
    eval_set: Any = None,
    test_set: Any = None,
    loss: LossFunction | None = None,
    stop: HasReason | None = None,
) -> RunResult:
    """Train a model by data-parallel SGD; every rank calls this with equal arguments.

    Args:
        config: Description of the run.
        runtime: This process, from ``start_runtime``.
        model: Module to train, changed in place; None builds ``config.model``.
        train_set: Map-style data set of (input, target); None builds ``config.data.train``. A name
            stands for one run: on a resume, other data are refused if they differ in length, or in
            the first, the middle or the last sample.
        eval_set: The same, held out, or a mapping of names to such; None builds
            ``config.data.eval``, unless a training set is given.
        test_set: The same, scored once at the end of the run, with the weights of the best
            checkpoint; None builds ``config.data.test``, if that is set.
        loss: Module or function of (outputs, targets) that gives the mean; None builds
            ``config.loss``.
        stop: Object with a ``reason`` that is read between steps: None, or why the run is to stop;
            None listens to SIGTERM, SIGINT and SIGUSR1.

    Returns:
        How the run ended, equal on all ranks.

    Raises:
        UserError: A subclass for what the user can fix.
        StoppedError: A signal came before the first step.

    Example:
        >>> with start_runtime() as runtime:  # doctest: +SKIP
        ...     fit(RunConfig(epochs=3), runtime).scores["eval/accuracy"]
    """
    given = Given(model, loss, train_set, eval_set, test_set)
    batch = config.data.batch_size, config.data.accumulate
    with (
        nullcontext(_stop_request(stop)) if stop is not None else stop_on_signal() as request,
        claim_run_folder(config, runtime) as folder,
    ):
        request.force = partial(end_process, error_propagation=runtime.error_propagation)
        resume_point = find_resume_point(config, folder, runtime)
        if resume_point.ending and not lacks_test(resume_point, config, given):
            reading = build_reading(config.data, config.seed)
            return repeat_result(resume_point.ending, resume_point, given, reading, runtime, folder)
        with (
            open_report(config, runtime, folder, resume_point.origin) as report,
            propagate_errors(runtime.error_propagation),
            translate_errors(lambda: request.reason, batch),
            torch_settings(config.compute, runtime.device, report.notice),
        ):
            return _train(config, given, runtime, resume_point, folder, report, request)


def _train(
    config: RunConfig,
    given: Given,
    runtime: Runtime,
    resume_point: ResumePoint,
    folder: RunFolder | None,
    report: Reporter,
    request: StopRequest,
) -> RunResult:
    """Set the run up, train, and build the result."""
    context = _set_up(config, given, runtime, resume_point)
    plan = context.plan
    rates = build_rates(context, config.schedule, config.compute)
    report.start(plan, context.state, (*resume_point.notes, *context.notes))
    timetable = Timetable(
        config.checkpoint,
        plan,
        row_steps=config.log.every_steps,
        score=config.eval,
        deadline=Deadline(resume_point.deadline),
    )
    shares, state, objective = context.shares, context.state, context.objective
    rank_sync = RankSync(plan, runtime, request, timetable, shares, state, objective)
    run_folder = Path(config.output_dir) / config.name
    seed_for_step = partial(runtime.seed_for, "model", config.seed)
    hang_s, logs = config.runtime.hang_s, run_folder / "logs"
    with compiled(context, config.compute, run_folder / CACHE_NAME):
        if config.compute.cuda_graphs:
            context = capture_step(context, rates.table, seed_for_step, report.notice)
        with (
            _checkpointer(context, folder, report, keep=config.checkpoint.keep) as checkpointer,
            _hang_watch(context, report, request, hang_s=hang_s, stacks=logs),
        ):
            request.defer()  # from here on a stop waits for the end of a step
            parts = timetable, rank_sync, checkpointer, report
            Loop(context, rates, seed_for_step, *parts).run()
            tested = score_test_set(context, folder.path if folder else None, report.notice)
            report.eval(tested)
            ranks = context.wrapper, context.shares, runtime
            result = build_result(context.state, plan, *ranks, tested=tested)
    report.end(result.as_row())
    return result


def _set_up(
    config: RunConfig, given: Given, runtime: Runtime, resume_point: ResumePoint
) -> TrainContext:
    """Build or take the components, compare the ranks, and build the context."""
    settings = config.model_dump(mode="json")
    components = gather_components(
        given,
        model=config.model,
        loss=config.loss,
        data=config.data,
        seed=config.seed,
        counts_correct=config.log.train_accuracy,
        eval_batch_size=config.eval.batch_size,
    )
    marks = require_consistency(settings, components, runtime)
    identity = Identity(
        run_id=resume_point.run_id, config=settings, loss=components.loss_name, marks=marks
    )
    samples, header, ranks = len(components.train_set), resume_point.header, runtime.world_size
    epoch = header.epoch if header else 0
    chosen, seed = components.reading.order, config.seed
    orders = cache(partial(build_order, chosen, samples=samples, seed=seed, epoch=epoch))
    plan = plan_from(
        config, header, samples=samples, world_size=ranks, facts_of_order=lambda g: orders(g).facts
    )
    order = orders(plan.global_batch)
    require_equal_orders(order, runtime)
    refuse_other_order(header, plan, orders)
    return build_context(
        replace(components, order=order),
        plan,
        runtime,
        resume_point,
        identity,
        optim=config.optim,
        parallel=config.parallel,
        compute=config.compute,
    )


def _checkpointer(
    context: TrainContext, folder: RunFolder | None, report: Reporter, *, keep: int
) -> AbstractContextManager[Checkpointer]:
    _, tensors = context.state_dict()
    return open_checkpointer(
        folder.path if folder else None,
        tensors,
        device=context.runtime.device,
        keep=keep,
        before=report.catch_up,  # a run that is killed has every row up to where it goes on
        report=lambda header, row: report.checkpoint(header.step, row),
    )


def _hang_watch(
    context: TrainContext,
    report: Reporter,
    request: StopRequest,
    *,
    hang_s: float | None,
    stacks: Path,
) -> AbstractContextManager[None]:
    return watch_for_hangs(
        context.runtime,
        context.progress,
        hang_s=hang_s,
        stacks=stacks,
        on_hang=report.fail,
        on_orphaned=lambda: request.ask("the launcher is gone"),
    )


def _stop_request(stop: HasReason) -> StopRequest:
    return stop if isinstance(stop, StopRequest) else StopRequest(stop)


def refuse_divergence(skipped: SkippedSteps, lr: float) -> None:
    """End a run whose gradients stay non-finite.

    Raises:
        DivergedError: There were 10 or more.
    """
    if skipped.longest_row >= _PATIENCE:
        raise DivergedError(
            f"the gradient is not finite for {skipped.longest_row} steps in a row at a rate of "
            f"{lr:g}; lower optim.lr, warm up longer, set optim.clip_norm, or look for bad samples."
        )
