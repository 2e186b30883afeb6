"""Run state: step, epoch, scores. What can be computed from the step is not kept here."""

from dataclasses import dataclass, field

from ddp_sgd.engine.evaluation import Metrics


@dataclass(slots=True)
class State:
    """The moving part of a run besides weights and momentum_buffers.

    Attributes:
        step: Optimizer steps taken, skipped ones included.
        scores: The last evaluation.
        scored_at: Step of the last evaluation.
        skipped: Steps without a finite gradient: all, those in a row by now, the longest row.
    """

    step: int = 0
    scores: Metrics = field(default_factory=dict)
    scored_at: int = 0
    skipped: tuple[int, int, int] = (0, 0, 0)
