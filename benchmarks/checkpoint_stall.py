"""How long training stands still for a checkpoint, against a plain ``torch.save``.

Usage: ``python -m benchmarks.checkpoint_stall [--megabytes 100] [--rounds 15]``.

Weights and momentum buffers of ``--megabytes`` in all. A save in the background ends when it is
verified on the disk and has its manifest: written, synced, read back, hashed twice.
"""

import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks import harness
from ddp_sgd.checkpointing.checkpointer import AsyncCheckpointer, Snapshot
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.store import CheckpointFolder
from ddp_sgd.config import RunConfig
from ddp_sgd.engine.train_state import State, run_state_dict
from ddp_sgd.optim.sgd import SGD, build_sgd
from ddp_sgd.plan import make_plan

PLAIN = "plain `torch.save`"


def measure(options: Namespace) -> Iterator[str]:
    """Save in turn by each way."""
    torch.set_num_threads(1)
    model, optimizer = _build_model(options.megabytes)
    plan = make_plan(RunConfig(), samples=10_000, world_size=1)
    state, host = State(), torch.device("cpu")
    saves_ms: list[float] = []
    gaps_s: list[float] = []

    def captured(at: State) -> tuple[Header, dict]:
        return run_state_dict(
            at, model=model, optimizer=optimizer, plan=plan, config={}, run_id="0", loss=""
        )

    kept = Snapshot(host)
    kept.reserve(captured(state)[1])
    with (
        tempfile.TemporaryDirectory(dir=".") as folder,
        AsyncCheckpointer(
            CheckpointFolder(Path(folder) / "checkpoints"),
            captured,
            captured(state)[1],
            device=host,
            keep=2,
            before=lambda: None,
            report=lambda _, row: saves_ms.append(1e3 * row["save_s"]),
        ) as checkpoints,
    ):

        def save() -> float:
            state.step += 1
            stall_s = harness.elapsed_s(lambda: checkpoints.save(state, {}))
            gaps_s.append(_longest_step_s(model))
            checkpoints.finish()
            return stall_s

        plain = Path(folder) / "plain.pt"
        cases = {
            PLAIN: lambda: harness.elapsed_s(lambda: torch.save(captured(state)[1], plain)),
            "copy into kept memory": lambda: harness.elapsed_s(
                lambda: kept.take(captured(state)[1])
            ),
            "`AsyncCheckpointer.save`": save,
            "longest step with nothing written": lambda: _longest_step_s(model),
        }
        found = harness.alternate(cases, options.rounds)
    found["longest step while it is written"] = gaps_s
    plain_s = median(found[PLAIN])
    yield harness.markdown_table(
        "what training waits for | ms, median (quartiles) | of plain",
        (
            (name, harness.quartiles([1e3 * s for s in times]), median(times) / plain_s)
            for name, times in found.items()
        ),
    )
    yield f"In the background a save takes {median(saves_ms):.0f} ms (median)."


def _build_model(megabytes: float) -> tuple[nn.Module, SGD]:
    width = 1024
    layers = round(megabytes * 1e6 / 2 / 4 / width / width)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    return model, build_sgd(model, momentum=0.9)


def _longest_step_s(model: nn.Module) -> float:
    """Take steps of about a millisecond for half a second; return the longest one."""
    inputs, longest = torch.randn(1, 1024), 0.0
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        longest = max(longest, harness.elapsed_s(lambda: model[0](inputs)))
    return longest


if __name__ == "__main__":
    parser = harness.option_parser(__doc__, rounds=15)
    parser.add_argument("--megabytes", type=float, default=100.0)
    harness.run_benchmark("checkpoint_stall", parser, measure)
