"""The whole run, from the description to the result, on one screen."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.distributed.error_watch import end_process
from ddp_sgd.distributed.fate import shared_fate
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.distributed.watch import keep_watch
from ddp_sgd.engine.agreement import require_agreement
from ddp_sgd.engine.assembly import Job, assemble
from ddp_sgd.engine.checkpoint import open_checkpoints
from ddp_sgd.engine.components import gather_parts, mark_training_set
from ddp_sgd.engine.data_marks import refuse_data_of_another_run
from ddp_sgd.engine.diagnosis import plain_faults
from ddp_sgd.engine.heartbeat import Heartbeat
from ddp_sgd.engine.loop import Loop
from ddp_sgd.engine.restoring import hand_over, refuse_other_parts
from ddp_sgd.engine.result import RunResult, conclude
from ddp_sgd.engine.resume import look_back
from ddp_sgd.engine.stopping import HasReason, StopRequest, stop_on_signal
from ddp_sgd.engine.timetable import Deadline, Timetable
from ddp_sgd.losses import LossFunction
from ddp_sgd.report.reporter import open_report, tell_of_the_end
from ddp_sgd.report.run_folder import RunFolder, claim_run_folder


def fit(
    config: RunConfig,
    runtime: Runtime,
    *,
    model: nn.Module | None = None,
    train_set: Any = None,
    eval_set: Any = None,
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
        eval_set: The same, held out; None builds ``config.data.eval``, unless a training set is
            given.
        loss: Module or function of (outputs, targets) that gives the mean; None builds
            ``config.loss``.
        stop: Object with a ``reason`` that is read between steps: None, or why the run is to stop;
            None listens to SIGTERM, SIGINT and SIGUSR1.

    Returns:
        How the run ended, equal on all ranks.

    Raises:
        UserError: A subclass says what the user can mend.
        StoppedError: A signal came before the first step.

    Example:
        >>> with start_runtime() as runtime:  # doctest: +SKIP
        ...     fit(RunConfig(epochs=3), runtime).scores["eval/accuracy"]
    """
    with (
        nullcontext(_stop_request(stop)) if stop is not None else stop_on_signal() as request,
        claim_run_folder(config, runtime) as folder,
    ):
        request.force = partial(end_process, fate=runtime.fate)
        past = look_back(config, folder, runtime)
        if past.ending:
            refuse_other_parts(past.header, train_set, loss)
            refuse_data_of_another_run(past, partial(mark_training_set, config, train_set), runtime)
            return _repeat_result(past.ending, past.file, model, runtime, folder)
        with (
            open_report(config, runtime, folder, past.origin) as report,
            shared_fate(runtime.fate),
            plain_faults(request),
        ):
            parts = gather_parts(config, model, loss, train_set, eval_set)
            marks = require_agreement(config, parts, runtime)
            job = assemble(config, parts, runtime, past, marks)
            report.start(job.plan, job.state, job.notes)
            with (
                open_checkpoints(config, job, past.run_id, folder, report) as checkpoints,
                keep_watch(
                    runtime,
                    job.pulse,
                    hang_s=config.runtime.hang_s,
                    stacks=Path(config.output_dir) / config.name / "logs",
                    on_hang=report.fail,
                    on_orphaned=lambda: request.ask("the launcher is gone"),
                ),
            ):
                deadline = Deadline(past.deadline)
                heartbeat = _heartbeat(config, job, runtime, request, deadline)
                every = config.eval.every_epochs
                request.defer()  # from here on a stop waits for the end of a step
                Loop(job, heartbeat, checkpoints, report, deadline, score_every=every).run()
                ending = conclude(job.state, job.plan, job.replica, job.shares, runtime)
            report.end(ending.as_row())
            return ending


def _repeat_result(
    result: RunResult,
    file: Path | None,
    model: nn.Module | None,
    runtime: Runtime,
    folder: RunFolder | None,
) -> RunResult:
    """Return the result of a run that is finished; a model that was given gets its weights."""
    if model is not None:
        hand_over(model, file, runtime)
    tell_of_the_end(result.as_row(), folder)
    return result


def _stop_request(stop: HasReason) -> StopRequest:
    return stop if isinstance(stop, StopRequest) else StopRequest(stop)


def _heartbeat(
    config: RunConfig, job: Job, runtime: Runtime, request: StopRequest, deadline: Deadline
) -> Heartbeat:
    return Heartbeat(
        job.plan,
        runtime,
        request,
        Timetable(config.checkpoint, job.plan, row_steps=config.log.every_steps),
        deadline,
        job.shares,
        job.state,
    )
