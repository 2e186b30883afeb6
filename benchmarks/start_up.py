"""How long commands take to answer, alternating, as whole processes.

Usage: ``python benchmarks/start_up.py [RUNS]`` prints a table in Markdown.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import ddp_sgd": ["-c", "import ddp_sgd"],
    "a wrong key is answered": ["-m", "ddp_sgd.train", "--optim.lrr=1"],
    "explain, 64 ranks": ["-m", "ddp_sgd.explain", "--world_size=64"],
    "train one epoch of the digits, W&B off": [
        *("-m", "ddp_sgd.train", "--epochs=1", "--wandb.mode=disabled"),
        f"--output_dir={os.environ.get('TMPDIR', '/tmp')}/ddp_sgd_start_up",
    ],
}


def measure(arguments: list[str]) -> float:
    """Return the wall time of one process in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    """Run every command in turn, several times, and print the medians."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(runs):
        for name, arguments in COMMANDS.items():
            times[name].append(measure(arguments))
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPUs, {platform.machine()}, "
        f"Python {platform.python_version()}, torch {version('torch')}, n = {runs}\n"
    )
    print("| what | median, s | lowest | highest |\n|---|---|---|---|")
    for name, values in times.items():
        print(
            f"| {name} | {statistics.median(values):.2f} | {min(values):.2f} | {max(values):.2f} |"
        )


if __name__ == "__main__":
    main()
