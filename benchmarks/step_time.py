"""Where the time of a step goes: the tutorials' loop beside ``ddp_sgd``, part by part.

Usage: ``python -m benchmarks.step_time [--turns 3] [--write FOLDER] [--plot FILE]``. The digits
MLP on 1 and 2 ranks, 32 samples a rank and step, gloo, one thread a rank. Both train in turn in the
same processes, ``ddp_sgd`` with journal, W&B offline and checkpoints at their defaults.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ddp_sgd.distributed.progress import Phase

if TYPE_CHECKING:
    from ddp_sgd import Runtime

RANKS = (1, 2)
EPOCHS = 120
PARTS = {
    "data": (Phase.DATA,),
    "forward": (Phase.FORWARD,),
    "backward, reduction": (Phase.BACKWARD, Phase.ALL_REDUCE),
    "weights": (Phase.OPTIMIZER,),
    "bookkeeping": (Phase.SYNC, Phase.SAVE),
}
"""Components of a step, by the phases that make them up."""

Spent = dict[str, float]
"""Time of a step by part, in microseconds."""


def main() -> None:
    """Measure, print a table, and keep it and a plot if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--as_rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        work_as_rank(options.turns, options.epochs)
        return
    load = os.getloadavg()[0]
    found = {ranks: measure(ranks, options.turns, options.epochs) for ranks in RANKS}
    text = table(found, options.turns, load)
    print(text)
    if options.write:
        name = f"step_time_{os.cpu_count()}cpu_{datetime.now(UTC):%Y%m}.md"
        (options.write / name).write_text(text)
    if options.plot:
        plot(found, options.plot)


def measure(ranks: int, turns: int, epochs: int) -> dict[str, list[Spent]]:
    """Return what each turn of each loop spent, on rank 0."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    words += ["--standalone", "-m", "benchmarks.step_time", "--as_rank"]
    words += [f"--turns={turns}", f"--epochs={epochs}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    found: dict[str, list[Spent]] = json.loads(done.stdout.splitlines()[-1])
    return found


def work_as_rank(turns: int, epochs: int) -> None:
    """Train by both loops in turn; rank 0 prints what they spent."""
    import torch
    import torch.distributed as dist

    from ddp_sgd import start_runtime

    torch.set_num_threads(1)
    found: dict[str, list[Spent]] = {"tutorial": [], "ddp_sgd": []}
    with tempfile.TemporaryDirectory() as folder, start_runtime(device="cpu") as runtime:
        if runtime.alone:  # the tutorials' loop wraps its model all the same
            dist.init_process_group("gloo")
        for turn in range(turns):
            found["tutorial"].append(tutorial(epochs))
            found["ddp_sgd"].append(ours(runtime, epochs, f"{folder}/{turn}"))
            dist.barrier()
        if runtime.alone:
            dist.destroy_process_group()
    if runtime.rank == 0:
        print(json.dumps(found))


def tutorial(epochs: int) -> Spent:
    """Train by the loop of PyTorch's tutorials, phase by phase."""
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    from ddp_sgd.data import Digits
    from ddp_sgd.distributed.progress import ProgressTracker
    from ddp_sgd.models import MLP

    digits = Digits()
    dataset = TensorDataset(torch.from_numpy(digits.inputs), torch.from_numpy(digits.targets))
    sampler: DistributedSampler[Any] = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=32, sampler=sampler)
    model = DistributedDataParallel(MLP(inputs=64, hidden=[64, 64], classes=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loss_fn = nn.CrossEntropyLoss()
    progress, steps, total = ProgressTracker(), 0, 0.0
    for epoch in range(epochs):
        progress.enter(Phase.DATA)
        sampler.set_epoch(epoch)
        for inputs, targets in loader:
            progress.enter(Phase.FORWARD)
            optimizer.zero_grad()
            loss = loss_fn(model(inputs), targets)
            progress.enter(Phase.BACKWARD)
            loss.backward()
            progress.enter(Phase.OPTIMIZER)
            optimizer.step()
            progress.enter(Phase.SYNC)
            total += loss.item()
            steps += 1
            progress.enter(Phase.DATA)
    return by_part(progress.spent_s(), steps)


def ours(runtime: "Runtime", epochs: int, folder: str) -> Spent:
    """Train by ``ddp_sgd`` at its defaults, but for the evaluation, which is not in the other."""
    from ddp_sgd import RunConfig, fit
    from ddp_sgd.data import Digits
    from ddp_sgd.distributed.progress import ProgressTracker
    from ddp_sgd.engine import setup

    progress = ProgressTracker(time.perf_counter)
    setup.ProgressTracker = lambda: progress  # type: ignore[assignment,misc]
    config = RunConfig.model_validate(
        {"output_dir": folder, "epochs": epochs, "wandb": {"mode": "offline"}}
    )
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        steps = fit(config, runtime, train_set=Digits()).step
    return by_part(progress.spent_s(), steps)


def by_part(spent_s: Any, steps: int) -> Spent:
    """Sum phases up to parts, in microseconds a step."""
    return {
        part: 1e6 * sum(spent_s.get(phase, 0.0) for phase in phases) / steps
        for part, phases in PARTS.items()
    }


def medians(turns: list[Spent]) -> Spent:
    """Return the median of each part."""
    return {part: median(turn[part] for turn in turns) for part in PARTS}


def table(found: dict[int, dict[str, list[Spent]]], turns: int, load: float) -> str:
    """Write the result in Markdown."""
    rows = []
    for ranks, loops in found.items():
        for loop, spent in loops.items():
            sums = sorted(sum(turn.values()) for turn in spent)
            cells = [f"{part:.0f}" for part in medians(spent).values()]
            whole = f"{median(sums):.0f} ({sums[0]:.0f} to {sums[-1]:.0f})"
            rows.append(f"| {ranks} | {loop} | {' | '.join(cells)} | {whole} |")
    return f"""# Where the time of a step goes

`python -m benchmarks.step_time --turns {turns}`, {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} \
CPUs, {platform.machine()}, Python {platform.python_version()}, torch {version("torch")}, gloo, \
one thread a rank, load average {load:.1f} before. Digits MLP, 32 samples a rank and step; {turns} \
turns of each loop in the same processes; medians on rank 0 in microseconds a step, of the whole \
also the lowest and the highest.

| ranks | loop | {" | ".join(PARTS)} | whole |
|---|---|{"---|" * len(PARTS)}---|
{chr(10).join(rows)}
"""


def plot(found: dict[int, dict[str, list[Spent]]], path: Path) -> None:
    """Draw a bar for each loop and number of ranks."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "step_time"
    from matplotlib import pyplot as plt

    bars = [(loop, ranks) for ranks in reversed(RANKS) for loop in ("ddp_sgd", "tutorial")]
    names = [f"{loop}, {ranks} rank{'s' if ranks > 1 else ''}" for loop, ranks in bars]
    figure, axes = plt.subplots(figsize=(9, 2.8), layout="constrained")
    starts = [0.0] * len(bars)
    colors = ("#4477aa", "#66ccee", "#228833", "#ccbb44", "#aa3377")
    for part, color in zip(PARTS, colors, strict=True):
        widths = [medians(found[ranks][loop])[part] for loop, ranks in bars]
        axes.barh(names, widths, left=starts, label=part, color=color, height=0.7)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    for name, whole in zip(names, starts, strict=True):
        axes.text(whole, name, f" {whole:.0f} us", va="center", fontsize=9)
    axes.set_xlabel("microseconds a step (digits MLP, 32 samples a rank)")
    axes.set_xlim(0, 1.12 * max(starts))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(PARTS), frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
