"""Logger protocol, with a null logger and a group of loggers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ddp_sgd.plan import Plan

Value = float | int | str | None
Row = Mapping[str, Value]
EventRow = tuple[str, Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where this life of a run begins.

    Args:
        run_id: Identity of the run, 8 letters and digits.
        has_rows: Whether there is a journal of an earlier life.
        is_resumed: Whether the run goes on from something.
        step: Steps that were taken before.
        epoch: Passes over the data before.
        samples: Samples that were trained before.
        is_scored: Whether the evaluation at this place was done.
        note: What is to be said of the checkpoint.
    """

    run_id: str
    has_rows: bool = False
    is_resumed: bool = False
    step: int = 0
    epoch: float = 0.0
    samples: int = 0
    is_scored: bool = False
    note: Row = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What is known about a run before its first step.

    Args:
        folder: The run folder, which exists.
        name: Name of the run.
        config: Resolved configuration, as plain data.
        plan: The run's arithmetic.
        world_size: Ranks.
        run_id: Identity of the run, 8 letters and digits; the same after every resume, also in W&B.
        resumed: Whether the run goes on, so that earlier rows exist.
        samples: Samples that were trained before.
        is_scored: Whether the evaluation at that place was done.
        notes: What the user should know, one line each.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    plan: Plan
    world_size: int
    run_id: str
    resumed: bool = False
    samples: int = 0
    is_scored: bool = False
    notes: tuple[str, ...] = ()


class Logger(Protocol):
    """One way out for measurements; only rank 0 holds loggers that write."""

    def start(self, record: RunRecord) -> None:
        """Open the outlet; called once, before the first row."""

    def write(self, rows: Sequence[EventRow]) -> None:
        """Take a burst of rows, in the order in which they came.

        Args:
            rows: Pairs of an event (``start``, ``resume``, ``train``, ``eval``, ``checkpoint``,
                ``stop`` or ``end``) and its row: values by name. Each row has ``time`` (unix s),
                ``step``, ``epoch`` (real) and ``samples``; a measurement that is not finite comes
                as None.
        """

    def finish(self, result: Mapping[str, Any]) -> None:
        """Close the outlet; called once, also when the run failed.

        Args:
            result: The content of ``result.json``.
        """


class NoLogger:
    """Discards every row: the logger of every rank but 0."""

    def start(self, record: RunRecord) -> None:
        """Do nothing."""

    def write(self, rows: Sequence[EventRow]) -> None:
        """Do nothing."""

    def finish(self, result: Mapping[str, Any]) -> None:
        """Do nothing."""


class Loggers:
    """Several loggers as one; each gets every row, the first logger first."""

    def __init__(self, loggers: Sequence[Logger]) -> None:
        """Keep the loggers."""
        self._loggers = tuple(loggers)
        self._opened: list[Logger] = []

    def start(self, record: RunRecord) -> None:
        """Open every outlet."""
        for logger in self._loggers:
            logger.start(record)
            self._opened.append(logger)

    def write(self, rows: Sequence[EventRow]) -> None:
        """Give the rows to every outlet that is open."""
        for logger in self._opened:
            logger.write(rows)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Close every outlet that is open, the last opened first."""
        for logger in reversed(self._opened):
            logger.finish(result)
