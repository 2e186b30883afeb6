"""The training loop: step, sync, evaluation, checkpoint."""

import time

from ddp_sgd.checkpointing.checkpointer import Checkpointer
from ddp_sgd.data.loader import StepBatches
from ddp_sgd.engine.error_translation import refuse_divergence
from ddp_sgd.engine.evaluation import Interrupted
from ddp_sgd.engine.setup import TrainContext
from ddp_sgd.engine.sync import RankSync, SyncResult
from ddp_sgd.engine.train_state import State
from ddp_sgd.engine.triggers import Deadline
from ddp_sgd.report.reporter import Reporter


class Loop:
    """Takes a run from where it stands to its end, or to where somebody asks it to stop.

    Args:
        context: The run; its state moves.
        rank_sync: The periodic all-reduce besides that of gradients.
        checkpointer: Saves the state.
        report: Where measurements go.
        deadline: Is told how long saves and evaluations take.
        score_every: Epochs between evaluations.
    """

    def __init__(
        self,
        context: TrainContext,
        rank_sync: RankSync,
        checkpointer: Checkpointer[State],
        report: Reporter,
        deadline: Deadline,
        *,
        score_every: int,
    ) -> None:
        self._context = context
        self._rank_sync = rank_sync
        self._checkpointer = checkpointer
        self._report = report
        self._deadline = deadline
        self._score_every = score_every

    def run(self) -> None:
        """Take steps; whatever ends them, the state is saved at the last one.

        Raises:
            DivergedError: Gradients stay non-finite.
            OutputError: The state cannot be saved.
        """
        context, state = self._context, self._context.state
        context.progress.enter("reading data", state.step)
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
            context.progress.enter("reading data", state.step)
        if not go_on:
            self._report.stop(self._rank_sync.reason)
        context.progress.enter("saving")
        self._checkpointer.finish()

    def _save(self) -> None:
        self._context.progress.enter("saving")
        self._checkpointer.save(self._context.state, self._context.wrapper.state_dict())

    def _take_step(self, batches: StepBatches) -> SyncResult | None:
        """Take a step, and log what the ranks have synchronized, if it was time."""
        context, state = self._context, self._context.state
        lr = context.rate(state.step)
        context.seed_model(state.step)
        result = context.stepper.step(batches, lr)
        state.step += 1
        context.progress.enter("sync")
        synced = self._rank_sync.after(state.step, result, lr=lr)
        if synced:
            state.skipped = synced.skipped
            self._report.train(synced.row)
            refuse_divergence(synced.skipped, lr)
            self._checkpointer.poll()
            self._deadline.save_s = self._checkpointer.save_s
        return synced

    def _is_to_stop(self, synced: SyncResult | None) -> bool:
        return (
            bool(synced and synced.stop)
            and self._context.state.step < self._context.plan.total_steps
        )

    def _score_if_due(self) -> bool:
        """Score at the end of an epoch; False if a stop request cut that short, on any rank."""
        context, state = self._context, self._context.state
        if (
            not context.plan.ends_epochs(state.step, self._score_every)
            or state.scored_at == state.step
        ):
            return True

        def is_unwanted() -> bool:
            return self._rank_sync.reason is not None and state.step < context.plan.total_steps

        context.progress.enter("evaluating", state.step)
        start = time.perf_counter()
        try:
            state.scores, state.scored_at = context.score(is_unwanted), state.step
        except Interrupted:
            return False
        self._report.eval(state.scores)
        self._deadline.score_s = time.perf_counter() - start
        return True
