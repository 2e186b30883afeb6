"""One run of one contestant, and the figures that it gives."""

import json
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.harness import journal_rows
from benchmarks.peers.lineup import CONTESTANTS
from benchmarks.peers.task import Task
from benchmarks.peers.watching import Watch
from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors

_BATCH = 128
WARM_UP = 0.1
"""Share of the steps that is left out at the beginning of the loop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What one run gave."""

    workload: str
    ranks: int
    round: int  # from 0
    contestant: str
    steps: int
    steps_per_s: float  # in the loop, without its beginning
    cpu_us: float  # CPU time of a rank per step, in the same part of the loop
    other_cpu_us: float  # CPU time of all processes that the ranks started, per step
    # From the command to the first step that is known to be done: of ddp_sgd the first row of its
    # journal, which is that of step 10 by default.
    first_step_s: float
    whole_s: float  # from the command to its end
    peak_mb: float  # most memory of a rank
    loss: float  # after the last step, measured for all alike

    def as_line(self) -> str:
        """Return it as a line of JSON."""
        return f"{json.dumps(asdict(self))}\n"


def measure(task: Task, workload: str, name: str, number: int) -> Record:
    """Run a contestant and look at it.

    Args:
        task: The work.
        workload: Its key.
        name: Key of the contestant.
        number: Number of the round.
    """
    contestant = CONTESTANTS[name]
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=task.folder) as folder:
        own = replace(task, output=folder)
        watch = Watch(
            contestant.command(own),
            contestant.environment(own),
            Path(folder) / "output.txt",
            ranks=task.ranks,
        )
        times = _times(Path(folder), is_ours=contestant.is_ours)
        loss = final_loss(own, is_ours=contestant.is_ours)
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


def _times(folder: Path, *, is_ours: bool) -> list[tuple[int, float]]:
    """Read when which step was done: from the journal of ``ddp_sgd``, or as the clock marked it."""
    if is_ours:
        return [(row["step"], row["time"]) for row in journal_rows(folder / "run")]
    return list(enumerate(json.loads((folder / "times.json").read_text()), start=1))


def final_loss(task: Task, *, is_ours: bool) -> float:
    """Return the mean loss over the first samples of the training data, measured for all alike.

    Batch normalization takes the statistics of the batch, since only the weights are compared.

    Args:
        task: The work; its output holds the weights.
        is_ours: Whether the weights are in a checkpoint of ``ddp_sgd``.
    """
    torch.set_num_threads(1)
    model = task.build_model()
    model.load_state_dict(_read_weights(Path(task.output), is_ours=is_ours))
    inputs, targets = (part[: task.scored] for part in task.read_tensors())
    batches = zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True)
    with torch.no_grad():
        total = sum(float(cross_entropy(model(x), y, reduction="sum")) for x, y in batches)
    return total / len(targets)


def _read_weights(output: Path, *, is_ours: bool) -> dict[str, Any]:
    if not is_ours:
        return torch.load(output / "weights.pt", weights_only=True)
    file, _ = find_checkpoint(output / "run")
    return read_tensors(file)["model"]
