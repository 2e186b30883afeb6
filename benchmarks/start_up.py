"""How long commands take to answer, and to their first step, alternating, as whole processes.

Usage: ``python benchmarks/start_up.py [RUNS]`` prints tables in Markdown.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

FOLDER = tempfile.mkdtemp(prefix="ddp_sgd_start_up_")
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
TRAIN = ["-m", "ddp_sgd.train", "--epochs=1", f"--output_dir={FOLDER}", "--resume=never"]

COMMANDS = {
    "import ddp_sgd": ["-c", "import ddp_sgd"],
    "a wrong key is answered": ["-m", "ddp_sgd.train", "--optim.lrr=1"],
    "explain, 64 ranks": ["-m", "ddp_sgd.explain", "--world_size=64"],
    "import torch": ["-c", "import torch"],
    "train one epoch of the digits, W&B off": [*TRAIN, "--wandb.mode=disabled"],
    "train one epoch of the digits, W&B offline": [*TRAIN, "--wandb.mode=offline"],
}
"""Timed from their start to their end."""

JOIN = f"""
import os, time
from pathlib import Path
import torch
import torch.distributed as dist
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    dist.init_process_group("gloo")
    dist.barrier()
if os.environ.get("RANK", "0") == "0":
    Path("{FOLDER}/joined").write_text(str(time.time()))
"""
STEP = [*TRAIN, "--name=step", "--log.every_steps=1", "--wandb.mode=offline"]

MOMENTS = {
    "import torch": ["JOIN"],
    "first step of ddp_sgd": STEP,
    "torchrun, 2 ranks: import torch, join by gloo": [*TORCHRUN, "JOIN"],
    "torchrun, 2 ranks: first step of ddp_sgd": [*TORCHRUN, *STEP],
}
"""Timed from their start to a moment: all have joined, or the first step is done."""


def main() -> None:
    """Run everything in turn, several times, and print the medians."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    whole: dict[str, list[float]] = {name: [] for name in COMMANDS}
    until: dict[str, list[float]] = {name: [] for name in MOMENTS}
    for _ in range(runs):
        for name, arguments in COMMANDS.items():
            whole[name].append(run(arguments))
        for name, arguments in MOMENTS.items():
            until[name].append(run_until(arguments))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPUs, {platform.machine()}, "
        f"Python {platform.python_version()}, torch {version('torch')}, n = {runs}"
    )
    print_table("from start to end", whole)
    print_table("from start to the moment", until)


def run(arguments: list[str]) -> float:
    """Return the wall time of one process in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def run_until(arguments: list[str]) -> float:
    """Return the time from the start of a process to its moment, in seconds."""
    program = Path(FOLDER) / "join.py"
    program.write_text(JOIN)
    words = [str(program) if word == "JOIN" else word for word in arguments]
    start = time.time()
    subprocess.run([sys.executable, *words], capture_output=True, check=True)
    if "JOIN" in arguments:
        return float((Path(FOLDER) / "joined").read_text()) - start
    rows = map(json.loads, (Path(FOLDER) / "step/metrics.jsonl").read_text().splitlines())
    return next(row["time"] for row in rows if row["event"] == "train") - start


def print_table(what: str, times: dict[str, list[float]]) -> None:
    """Print medians in Markdown."""
    print(f"\n| {what} | median, s | lowest | highest |\n|---|---|---|---|")
    for name, values in times.items():
        print(
            f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |"
        )


if __name__ == "__main__":
    main()
