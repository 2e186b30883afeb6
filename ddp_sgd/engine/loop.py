"""The loop: step, heartbeat, evaluation, checkpoint."""

import time

from ddp_sgd.data.loading import StepBatches
from ddp_sgd.engine.assembly import Job
from ddp_sgd.engine.checkpoint import Checkpoints
from ddp_sgd.engine.diagnosis import refuse_divergence
from ddp_sgd.engine.evaluation import Interrupted
from ddp_sgd.engine.heartbeat import Beat, Heartbeat
from ddp_sgd.engine.timetable import Deadline
from ddp_sgd.report.reporter import Reporter


class Loop:
    """Takes a run from where it stands to its end, or to where somebody asks it to stop.

    Args:
        job: The run; its state moves.
        heartbeat: Where ranks talk besides gradients.
        checkpoints: Where the state goes.
        report: Where measurements go.
        deadline: Is told how long saves and evaluations take.
        score_every: Epochs between evaluations.
    """

    def __init__(
        self,
        job: Job,
        heartbeat: Heartbeat,
        checkpoints: Checkpoints,
        report: Reporter,
        deadline: Deadline,
        *,
        score_every: int,
    ) -> None:
        self._job = job
        self._heartbeat = heartbeat
        self._checkpoints = checkpoints
        self._report = report
        self._deadline = deadline
        self._score_every = score_every

    def run(self) -> None:
        """Take steps; whatever ends them, the state is saved at the last one.

        Raises:
            DivergedError: Gradients stay non-finite.
            OutputError: The state cannot be saved.
        """
        job, state = self._job, self._job.state
        job.pulse.at("reading data", state.step)
        scored_before = state.scored_at
        go_on = self._score_if_due()  # the run may have been stopped just before
        if state.scored_at != scored_before:  # it may be the best, and must not be forgotten
            self._save()
        for batches in job.loader.from_step(state.step, job.skip) if go_on else ():
            beat = self._take_step(batches)
            go_on = not self._is_to_stop(beat) and self._score_if_due()
            if not go_on or (beat and beat.save):
                self._save()
            if not go_on:
                break
            job.pulse.at("reading data", state.step)
        if not go_on:
            self._report.stop(self._heartbeat.reason)
        job.pulse.at("saving")
        self._checkpoints.finish()

    def _save(self) -> None:
        self._job.pulse.at("saving")
        self._checkpoints.save(self._job.state, self._job.replica.memory())

    def _take_step(self, batches: StepBatches) -> Beat | None:
        """Take a step, and tell what the heartbeat tells, if there was one."""
        job, state = self._job, self._job.state
        lr = job.rate(state.step)
        job.seed_model(state.step)
        result = job.stepper.step(batches, lr)
        state.step += 1
        job.pulse.at("heartbeat")
        beat = self._heartbeat.after(state.step, result, lr=lr)
        if beat:
            state.skipped = beat.skipped
            self._report.train(beat.row)
            refuse_divergence(beat.skipped, lr)
            self._checkpoints.poll()
            self._deadline.save_s = self._checkpoints.save_s
        return beat

    def _is_to_stop(self, beat: Beat | None) -> bool:
        return bool(beat and beat.stop) and self._job.state.step < self._job.plan.total_steps

    def _score_if_due(self) -> bool:
        """Score at the end of an epoch; False if a wish to stop cut that short, on any rank."""
        job, state = self._job, self._job.state
        if not job.plan.ends_epochs(state.step, self._score_every) or state.scored_at == state.step:
            return True

        def is_unwanted() -> bool:
            return self._heartbeat.reason is not None and state.step < job.plan.total_steps

        job.pulse.at("evaluating", state.step)
        start = time.perf_counter()
        try:
            state.scores, state.scored_at = job.score(is_unwanted), state.step
        except Interrupted:
            return False
        self._report.eval(state.scores)
        self._deadline.score_s = time.perf_counter() - start
        return True
