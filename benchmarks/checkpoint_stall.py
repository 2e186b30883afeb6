"""How long training stands still for a checkpoint, against a plain ``torch.save``.

Usage: ``python benchmarks/checkpoint_stall.py [--megabytes 100] [--rounds 15]``. Prints a table;
``--write FOLDER`` keeps it as a dated result. The rounds alternate, so that drift of the machine
meets all of them; each figure is a median with its spread.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import nn

from ddp_sgd.checkpointing.checkpointer import AsyncCheckpointer, Snapshot
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.store import CheckpointFolder
from ddp_sgd.config import RunConfig
from ddp_sgd.engine.train_state import State, run_state_dict
from ddp_sgd.optim.sgd import SGD, build_sgd
from ddp_sgd.plan import make_plan


def main() -> None:
    """Measure, print, and keep the result if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        table = measure(Path(folder), options.megabytes, options.rounds)
    print(table)
    if options.write:
        now = datetime.now(UTC)
        path = options.write / f"checkpoint_stall_{os.cpu_count()}cpu_{now:%Y%m}.md"
        path.write_text(table)


def measure(folder: Path, megabytes: float, rounds: int) -> str:
    """Alternate between the contestants.

    Args:
        folder: Where to write.
        megabytes: Size of weights and momentum buffers together.
        rounds: Measurements of each.

    Returns:
        The result as Markdown.
    """
    model, optimizer = _model(megabytes)
    plan = make_plan(RunConfig(), samples=10_000, world_size=1)
    state = State()

    def captured(at: State) -> tuple[Header, dict]:
        return run_state_dict(
            at, model=model, optimizer=optimizer, plan=plan, config={}, run_id="0", loss=""
        )

    told: list[dict] = []
    times: dict[str, list[float]] = {name: [] for name in ("save", "copy", "ours", "longest gap")}
    host = torch.device("cpu")
    kept = Snapshot(host)
    kept.reserve(captured(state)[1])
    saved = CheckpointFolder(folder / "checkpoints")
    with AsyncCheckpointer(
        saved,
        captured(state)[1],
        device=host,
        keep=2,
        before=lambda: None,
        report=lambda header, row: told.append({"step": header.step, **row}),
    ) as checkpoints:
        for _ in range(rounds):
            state.step += 1
            times["save"].append(
                _timed(lambda: torch.save(captured(state)[1], folder / "plain.pt"))
            )
            times["copy"].append(_timed(lambda: kept.take(captured(state)[1])))
            times["ours"].append(_timed(lambda: checkpoints.save(*captured(state))))
            times["longest gap"].append(_longest_gap(model, checkpoints))
    quiet = [_longest_gap(model, None) for _ in range(rounds)]
    return _report(times, quiet, megabytes, rounds, told)


def _model(megabytes: float) -> tuple[nn.Module, SGD]:
    width = 1024
    layers = round(megabytes * 1e6 / 2 / 4 / width / width)
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    return model, build_sgd(model, momentum=0.9)


def _timed(work) -> float:  # noqa: ANN001
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _longest_gap(model: nn.Module, checkpoints: AsyncCheckpointer | None) -> float:
    """Go on with steps of about a millisecond while the copy is written; the longest one."""
    inputs, longest = torch.randn(1, 1024), 0.0
    end = time.perf_counter() + 0.5
    while time.perf_counter() < end:
        longest = max(longest, _timed(lambda: model[0](inputs)))
    if checkpoints is not None:
        checkpoints.finish()
    return longest


def _report(
    times: dict[str, list[float]],
    quiet: list[float],
    megabytes: float,
    rounds: int,
    told: list[dict],
) -> str:
    plain = statistics.median(times["save"])
    names = {
        "save": "plain `torch.save`",
        "copy": "copy into kept memory",
        "ours": "`AsyncCheckpointer.save`",
        "longest gap": "longest step while it is written",
    }
    lines = [
        f"# Stall of training for a checkpoint of {megabytes:g} MB",
        "",
        f"`python benchmarks/checkpoint_stall.py --megabytes {megabytes:g} --rounds {rounds}`, "
        f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, python "
        f"{platform.python_version()}, {platform.machine()}, one thread, {rounds} alternating "
        "rounds.",
        "",
        "| what training waits for | median, ms | lower to upper quartile, ms | of plain |",
        "|---|---|---|---|",
    ]
    for key, name in names.items():
        low, middle, high = statistics.quantiles(times[key], n=4)
        lines.append(
            f"| {name} | {1e3 * middle:.1f} | {1e3 * low:.1f} to {1e3 * high:.1f} | "
            f"{middle / plain:.2f} |"
        )
    low, middle, high = statistics.quantiles(quiet, n=4)
    lines.append(
        f"| longest step with nothing written | {1e3 * middle:.1f} | {1e3 * low:.1f} to "
        f"{1e3 * high:.1f} | {middle / plain:.2f} |"
    )
    whole = statistics.median(row["save_s"] for row in told)
    lines += [
        "",
        f"In the background a save takes {1e3 * whole:.0f} ms (median) until it is verified on the "
        "disk and has its manifest: written, synced, read back, hashed twice.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
