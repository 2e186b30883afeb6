"""The whole run, from the description to the result, on one screen."""

from contextlib import nullcontext
from typing import Any

from torch import nn

from ddp_sgd.config.schema import RunConfig
from ddp_sgd.distributed.collectives import gather_over_ranks
from ddp_sgd.distributed.fate import shared_fate
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.assembly import assemble, gather_parts
from ddp_sgd.engine.diagnosis import plain_faults, refuse_divergence
from ddp_sgd.engine.heartbeat import Heartbeat
from ddp_sgd.engine.result import RunResult, conclude
from ddp_sgd.engine.state import State
from ddp_sgd.engine.stopping import StopRequest, stop_on_signal
from ddp_sgd.losses import LossFunction
from ddp_sgd.report.reporter import open_report


def fit(
    config: RunConfig,
    runtime: Runtime,
    *,
    model: nn.Module | None = None,
    train_set: Any = None,
    eval_set: Any = None,
    loss: LossFunction | None = None,
    stop: StopRequest | None = None,
) -> RunResult:
    """Train a model by data-parallel SGD; every rank calls this with equal arguments.

    Args:
        config: Description of the run.
        runtime: This process, from ``start_runtime``.
        model: Module to train, changed in place; None builds ``config.model``.
        train_set: Map-style data set of (input, target); None builds ``config.data.train``.
        eval_set: The same, held out; None builds ``config.data.eval``, unless a training set is
            given.
        loss: Module or function of (outputs, targets) that gives the mean; None builds
            ``config.loss``.
        stop: A wish to stop that somebody else hears; None listens to SIGTERM, SIGINT and SIGUSR1
            itself.

    Returns:
        How the run ended, equal on all ranks.

    Raises:
        UserError: A subclass says what the user can mend.

    Example:
        >>> with start_runtime() as runtime:  # doctest: +SKIP
        ...     fit(RunConfig(epochs=3), runtime).scores["eval/accuracy"]
    """
    with (
        nullcontext(stop) if stop else stop_on_signal() as wish,
        open_report(config, runtime) as report,
        shared_fate(runtime.fate),
        plain_faults(),
    ):
        gather_over_ranks(None, runtime)  # where rank 0 has no folder, the others go no further
        parts = gather_parts(config, model=model, loss=loss, train_set=train_set, eval_set=eval_set)
        job = assemble(config, parts, runtime)
        plan, state = job.plan, State()
        report.start(plan)
        heartbeat = Heartbeat(plan, runtime, wish, every_steps=config.log.every_steps)
        for batches in job.loader.from_step(state.step):
            lr = job.rate(state.step)
            job.seed_model(state.step)
            result = job.stepper.step(batches, lr)
            state.step += 1
            if beat := heartbeat.after(state.step, result, lr=lr, wait_s=batches.wait_s):
                report.train(state.step, beat.row)
                refuse_divergence(beat.skipped_in_a_row, lr)
                if beat.stop and state.step < plan.total_steps:
                    report.stop(state.step, wish.reason)
                    break
            if plan.ends_epochs(state.step, config.eval.every_epochs):
                state.scores = job.score()
                report.eval(state.step, state.scores)
                heartbeat.restart_clock()
        ending = conclude(state, plan, job.replica, runtime)
        report.end(ending.as_row())
        return ending
