"""A run folder as a trainer leaves it, written in the test, with the W&B logger beside it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ddp_sgd.config import RunConfig, WandbConfig, dump_yaml
from ddp_sgd.plan import make_plan
from ddp_sgd.report.journal import EventRow, Journal, Origin, RunRecord
from ddp_sgd.report.wandb_logger import WandbLogger

CONFIG = RunConfig(name="trial", epochs=2)
OFFLINE = WandbConfig(mode="offline")
RESULT = {"status": "finished", "exit_code": 0, "weights_digest": "5ca1e", "wall_s": 1.5}
STOPPED = {**RESULT, "status": "stopped", "exit_code": 75}
COMMIT = 40 * "c"


def make_record(folder: Path) -> RunRecord:
    """Describe a run in a new folder."""
    folder.mkdir()
    return RunRecord(
        folder=folder,
        config=CONFIG,
        plan=make_plan(CONFIG, samples=1437, world_size=2),
        origin=Origin(run_id="cafe0123"),
    )


def resumed(record: RunRecord, step: int = 0, **changes: Any) -> RunRecord:
    """Describe the same run when it goes on after a step, whose evaluation was done."""
    origin = replace(record.origin, has_rows=True, samples=32 * step, is_scored=True)
    return replace(record, origin=origin, **changes)


def write_plan(record: RunRecord, config: WandbConfig) -> None:
    """Write what a run folder holds before the first row."""
    full = record.config.model_copy(update={"wandb": config})
    (record.folder / "config.yaml").write_text(dump_yaml(full))
    (record.folder / "plan.json").write_text(json.dumps(asdict(record.plan)))
    (record.folder / "result.json").unlink(missing_ok=True)


class TrackedRun:
    """One attempt of a run: its journal and its W&B logger.

    Args:
        record: What is known about the run.
        say: Takes the lines for the user.
        config: Section ``wandb`` of the configuration.
    """

    def __init__(
        self, record: RunRecord, say: Callable[[str], None], config: WandbConfig | None = None
    ) -> None:
        config = config or WandbConfig()
        write_plan(record, config)
        self.folder = record.folder
        self.journal, self.logger = Journal(), WandbLogger(config, echo=say)
        self.journal.start(record)
        self.logger.start(record)
        origin = record.origin
        axes = {"time": 1.7e9, "step": origin.samples // 32, "samples": origin.samples}
        row = {**axes, "git_commit": COMMIT, "run_id": origin.run_id}
        self.write([("resume" if origin.has_rows else "start", row)])

    def write(self, rows: Sequence[EventRow]) -> None:
        """Write rows."""
        self.journal.write(rows)
        self.logger.write(rows)

    def finish(self, result: dict[str, Any]) -> None:
        """End the run."""
        (self.folder / "result.json").write_text(json.dumps(result))
        self.logger.finish(result)
        self.journal.finish(result)


def rows_of(first: int, last: int) -> list[EventRow]:
    """Rows of every tenth step, each third one an evaluation after the same samples."""
    rows: list[EventRow] = []
    for step in range(first, last + 1, 10):
        axes = {"time": 1.7e9 + step, "step": step, "epoch": step / 40, "samples": 32 * step}
        rows.append(("train", {**axes, "train/loss": 1 / step}))
        if step % 30 == 0:
            rows.append(("eval", {**axes, "eval/accuracy": 1 - step / 100}))
    return rows


def places(rows: Any) -> list[tuple[int, bool]]:
    """Give the place of every row: its step, and whether it is an evaluation."""
    return [(row["step"], "eval/accuracy" in row) for row in rows]
