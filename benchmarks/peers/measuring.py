"""One run of one contestant, and the figures that it gives."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peers.lineup import CONTESTANTS
from benchmarks.peers.scoring import final_loss
from benchmarks.peers.task import Task
from benchmarks.peers.watching import Watch
from benchmarks.peers.workloads import WORKLOADS, Workload

WARM_UP = 0.1
"""Share of the steps that is left out at the beginning of the loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one run gave.

    Args:
        workload: Key of the workload.
        ranks: Processes.
        round: Number of the round, from 0.
        contestant: Key of the contestant.
        steps: Steps taken.
        steps_per_s: Steps a second in the loop, without its beginning.
        cpu_us: CPU time of a rank for a step, in us, in the same part of the loop.
        other_cpu_us: CPU time of all processes that the ranks started, for a step, in us.
        first_step_s: From the command to the first step that is known to be done: of ``ddp_sgd``
            the first row of its journal, which is that of step 10 by default.
        whole_s: From the command to its end.
        peak_mb: Most memory of a rank, in MB.
        loss: Loss after the last step, measured for all alike.
    """

    workload: str
    ranks: int
    round: int
    contestant: str
    steps: int
    steps_per_s: float
    cpu_us: float
    other_cpu_us: float
    first_step_s: float
    whole_s: float
    peak_mb: float
    loss: float

    def as_line(self) -> str:
        """Return it as a line of JSON."""
        return f"{json.dumps(asdict(self))}\n"


@contextmanager
def prepared(workload: Workload, ranks: int) -> Iterator[Task]:
    """Keep the files of a workload in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:
        yield workload.prepare(Path(folder), ranks)


def measure(task: Task, workload: str, name: str, number: int) -> Record:
    """Run a contestant and look at it.

    Args:
        task: The work.
        workload: Its key.
        name: Key of the contestant.
        number: Number of the round.
    """
    contestant = CONTESTANTS[name]
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=Path(task.data).parent) as folder:
        own = replace(task, output=folder)
        watch = Watch(
            contestant.command(own),
            contestant.environment(own),
            Path(folder) / "output.txt",
            ranks=task.ranks,
        )
        times = _journal(Path(folder)) if contestant.is_ours else _times(Path(folder))
        loss = final_loss(own, WORKLOADS[workload].scored, is_ours=contestant.is_ours)
    steps, end = times[-1]
    first, start = next(each for each in times if each[0] >= WARM_UP * steps)
    us_per_step = 1e6 / (steps - first)
    return Record(
        workload=workload,
        ranks=task.ranks,
        round=number,
        contestant=name,
        steps=steps,
        steps_per_s=(steps - first) / (end - start),
        cpu_us=us_per_step * watch.rank_cpu_s(start, end),
        other_cpu_us=us_per_step * watch.other_cpu_s(start, end),
        first_step_s=times[0][1] - watch.start,
        whole_s=watch.end - watch.start,
        peak_mb=watch.peak_mb(),
        loss=loss,
    )


def _times(folder: Path) -> list[tuple[int, float]]:
    """Read when which step was done."""
    return list(enumerate(json.loads((folder / "times.json").read_text()), start=1))


def _journal(folder: Path) -> list[tuple[int, float]]:
    """Read the same of the rows of a journal."""
    rows: list[dict[str, Any]] = [
        json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()
    ]
    return [(row["step"], row["time"]) for row in rows if row["event"] == "train"]
