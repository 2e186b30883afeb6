"""The loop: step, heartbeat, evaluation, checkpoint."""

import time

from ddp_sgd.engine.assembly import Job
from ddp_sgd.engine.checkpoint import Checkpoints
from ddp_sgd.engine.diagnosis import refuse_divergence
from ddp_sgd.engine.evaluation import Interrupted
from ddp_sgd.engine.heartbeat import Heartbeat
from ddp_sgd.engine.timetable import Deadline
from ddp_sgd.report.reporter import Reporter


def train(
    job: Job,
    heartbeat: Heartbeat,
    checkpoints: Checkpoints,
    report: Reporter,
    deadline: Deadline,
    *,
    score_every: int,
) -> None:
    """Take a run from where it stands to its end, or to where somebody asks it to stop.

    Whatever ends it, the state is saved at the last step.

    Args:
        job: The run; its state moves.
        heartbeat: Where ranks talk besides gradients.
        checkpoints: Where the state goes.
        report: Where measurements go.
        deadline: Is told how long saves and evaluations take.
        score_every: Epochs between evaluations.

    Raises:
        DivergedError: Gradients stay non-finite.
        OutputError: The state cannot be saved.
    """
    plan, state = job.plan, job.state

    def is_unwanted() -> bool:
        return heartbeat.reason is not None and state.step < plan.total_steps

    def score_if_due() -> bool:
        """Score at the end of an epoch; False if that was cut short by a wish to stop."""
        if plan.ends_epochs(state.step, score_every) and state.scored_at != state.step:
            job.pulse.at("evaluating", state.step)
            start = time.perf_counter()
            try:
                state.scores, state.scored_at = job.score(is_unwanted), state.step
            except Interrupted:
                return False
            report.eval(state.scores)
            deadline.score_s = time.perf_counter() - start
            heartbeat.restart_clock()
        return True

    job.pulse.at("reading data", state.step)
    if not score_if_due():  # the run may have been stopped just before
        report.stop(heartbeat.reason)
        return
    for batches in job.loader.from_step(state.step, job.skip):
        lr = job.rate(state.step)
        job.seed_model(state.step)
        result = job.stepper.step(batches, lr)
        state.step += 1
        job.pulse.at("heartbeat")
        beat = heartbeat.after(state.step, result, lr=lr, wait_s=batches.wait_s)
        stopping = False
        if beat:
            state.skipped = beat.skipped
            report.train(beat.row)
            refuse_divergence(beat.skipped, lr)
            checkpoints.poll()
            deadline.save_s = checkpoints.save_s
            stopping = beat.stop and state.step < plan.total_steps
        stopping = stopping or not score_if_due()
        if stopping or (beat and beat.save):
            job.pulse.at("saving")
            checkpoints.save(state)
        if stopping:
            report.stop(heartbeat.reason)
            break
        job.pulse.at("reading data", state.step)
    job.pulse.at("saving")
    checkpoints.finish()
