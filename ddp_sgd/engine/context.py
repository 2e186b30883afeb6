"""Train context: a run that is ready to start, and its state dict."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from ddp_sgd.checkpointing.store import Header
from ddp_sgd.data.loader import StepBatches, TrainLoader
from ddp_sgd.distributed.collectives import broadcast_over_ranks
from ddp_sgd.distributed.data_parallel import DataParallelModel
from ddp_sgd.distributed.progress import ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.after_step import AfterStep
from ddp_sgd.engine.buffers import TrainingBuffers, buffer_at, buffers_by_name
from ddp_sgd.engine.evaluation import Score
from ddp_sgd.engine.rank_consistency import Identity
from ddp_sgd.engine.resume import MARKS
from ddp_sgd.engine.static_batches import copy_batch
from ddp_sgd.engine.step import StepTaker
from ddp_sgd.engine.sync import TimeShares
from ddp_sgd.engine.train_state import (
    State,
    Tree,
    other_state_dict,
    restore_buffers,
    run_state_dict,
)
from ddp_sgd.losses import Objective
from ddp_sgd.optim.sgd import SGD
from ddp_sgd.plan import Plan
from ddp_sgd.seeds import Randomness

_LOOKED_AT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainContext:
    """A run that is ready to start; its ``state_dict`` is what a checkpoint holds.

    Args:
        plan: The run's arithmetic.
        runtime: This process.
        wrapper: The model, equal on all ranks.
        stepper: Takes steps.
        after_step: What calls the model after a step; None: nothing does.
        objective: What is minimized.
        loader: The training set, step by step.
        score: Evaluates the model on all held-out sets; gives nothing if there are none.
        score_test: Evaluates it on the test set; None: there is none.
        evaluates: Whether there is a held-out set or a test set.
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
    after_step: AfterStep | None
    objective: Objective
    loader: TrainLoader
    score: Score
    score_test: Score | None
    evaluates: bool
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

    def peek(self) -> Iterator[StepBatches]:
        """Yield copies of the batches of the next steps, at most 8, on the device.

        The loader reads them again when they are trained.
        """
        steps: Any = self.loader.from_step(self.state.step, self.skip)
        with closing(steps):
            for each in islice(steps, _LOOKED_AT):
                copies = (copy_batch(batch) for batch in each.micro_batches)
                yield each._replace(micro_batches=tuple(copies))

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
        broadcast_buffers_of(self.loss_modules, self.runtime)
        momentum = self.optimizer.state_dict()["momentum_buffer"].values()
        broadcast_over_ranks(momentum, self.runtime)
        self.wrapper.load_state_dict(saved.get("compression") if saved else None)
        if loss_scale := self.stepper.loss_scale:
            loss_scale.load_state_dict(saved.get("loss_scale") if saved else None, self.runtime)


def broadcast_buffers_of(modules: Mapping[str, nn.Module], runtime: Runtime) -> None:
    """Replace the buffers of some modules, such as those of the loss, by those of rank 0."""
    broadcast_over_ranks(map(buffer_at, buffers_by_name(modules).values()), runtime)
