"""Harness of all benchmarks: options, subprocesses, alternating rounds, statistics and results.

A benchmark is a module with a function that measures and returns blocks of Markdown;
``run_benchmark`` does all around it. The module's docstring is the help of its command, and
describes the method in its result. What needs a process of its own is the module's worker.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from typing import Any, TypeVar

from ddp_sgd.host import free_port

ROOT = Path(__file__).resolve().parents[1]
Key = TypeVar("Key")
Value = TypeVar("Value")
_T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 6: 2.447, 9: 2.262, 14: 2.145, 19: 2.093}
"""Quantiles of Student's distribution, two-sided, by degrees of freedom."""


def option_parser(doc: str | None, *, rounds: int | None = None) -> argparse.ArgumentParser:
    """Build the parser of a benchmark's command line, with the options that all have."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form)
    parser.add_argument("--rounds", type=int, default=rounds, help="measurements of each case")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="keep the result there")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser


def run_benchmark(
    name: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], Iterable[str]],
    *,
    worker: Callable[..., Any] | None = None,
    packages: Sequence[str] = ("torch",),
) -> str:
    """Run a benchmark as a command: measure, print the result, and keep it if asked to.

    Args:
        name: First word of the result's file.
        parser: Command line, from ``option_parser``.
        measure: Measures as the options say, and gives paragraphs and tables.
        worker: Does what ``run_worker`` asks for, in its process.
        packages: Packages whose versions matter.

    Returns:
        The result.
    """
    options = parser.parse_args()
    if worker is not None and options.worker is not None:
        if (found := worker(*options.worker)) is not None:
            print(json.dumps(found))
        return ""
    start, load = time.monotonic(), os.getloadavg()[0]
    blocks = list(measure(options))
    took_min = (time.monotonic() - start) / 60
    title, *method = (parser.description or name).strip().split("\n\n")
    method = [block for block in method if not block.startswith("Usage:")]
    words = " ".join(["python -m", _module_name(), *sys.argv[1:]])
    facts = (
        f"`{words}`, {datetime.now(UTC):%Y-%m-%d}, {took_min:.1f} min, {machine_facts(packages)}; "
        f"one thread per rank; load average {load:.1f} before, {os.getloadavg()[0]:.1f} after. "
        "Figures are medians (lowest to highest) over the rounds, which alternate."
    )
    text = "\n\n".join([f"# {title.rstrip('.')}", facts, *method, *blocks])
    print(text)
    if options.write:
        write_result(options.write, name, text)
    return text


def write_result(folder: Path, name: str, text: str) -> Path:
    """Write a result into the file of its name, machine and month, above the earlier ones."""
    path = folder / f"{name}_{os.cpu_count()}cpu_{datetime.now(UTC):%Y%m}.md"
    earlier = f"\n{path.read_text()}" if path.exists() else ""
    path.write_text(f"{text}\n{earlier}")
    return path


def machine_facts(packages: Sequence[str]) -> str:
    """Return CPUs, architecture, and the versions of Python and of packages."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cpus = f"{os.cpu_count()} CPUs ({models[0] if models else platform.processor()})"
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{cpus}, {platform.machine()}, Python {platform.python_version()}, {versions}"


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else sys.argv[0]


# Subprocesses


def python_command(*words: str, ranks: int = 1) -> list[str]:
    """Return the command of a Python program: under torchrun for several ranks."""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    return [sys.executable, *(torchrun if ranks > 1 else []), *words]


def run_python(
    *words: str, ranks: int = 1, cwd: Path = ROOT, may_fail: bool = False, **variables: str
) -> str:
    """Run a Python program with one thread per rank, and return what it prints on stdout.

    Raises:
        RuntimeError: It fails.
    """
    command = python_command(*words, ranks=ranks)
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    if done.returncode and not may_fail:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def run_worker(module: str, *arguments: Any, ranks: int = 1, **variables: str) -> Any:
    """Run the worker of a benchmark in processes of its own, and return what rank 0 returns."""
    words = ("-m", module, f"--worker={json.dumps(arguments)}")
    return json.loads(run_python(*words, ranks=ranks, **variables).splitlines()[-1])


def fit_with(progress: Any, runtime: Any, train_set: Any, **sections: Any) -> int:
    """Train without output, with a progress tracker; return the number of steps."""
    from ddp_sgd import RunConfig, fit
    from ddp_sgd.engine import setup

    setup.ProgressTracker = lambda: progress  # type: ignore[assignment,misc]
    config = RunConfig.model_validate({"resume": "never", **sections})
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        return fit(config, runtime, train_set=train_set).step


def rank_environment(
    rank: int = 0, world_size: int = 1, *, address: str = "127.0.0.1", port: int | None = None
) -> dict[str, str]:
    """Return the variables of a rank that no launcher starts; a remote address gives it a host."""
    is_local = address == "127.0.0.1"
    values = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": rank if is_local else 0,
        "LOCAL_WORLD_SIZE": world_size if is_local else 1,
        "MASTER_ADDR": address,
        "MASTER_PORT": port or free_port(),
        "GLOO_SOCKET_IFNAME": "lo" if is_local else "eth0",
        "OMP_NUM_THREADS": 1,
    }
    return {name: str(value) for name, value in values.items()}


def journal_rows(folder: Path, event: str = "train") -> list[dict[str, Any]]:
    """Read the rows of one kind from the journal of a run folder."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] == event]


# Rounds


def rotated(cases: Iterable[Key], number: int) -> list[Key]:
    """Return the order of a round: it moves on by one case per round."""
    names = list(cases)
    first = number % max(1, len(names))
    return [*names[first:], *names[:first]]


def alternate(cases: Mapping[Key, Callable[[], Value]], rounds: int) -> dict[Key, list[Value]]:
    """Measure every case once per round, so that drift of the machine meets all of them."""
    found: dict[Key, list[Value]] = {name: [] for name in cases}
    for number in range(rounds):
        for name in rotated(cases, number):
            start = time.monotonic()
            found[name].append(cases[name]())
            print_progress(f"round {number}: {name}, {time.monotonic() - start:.1f} s")
    return found


def print_progress(text: str) -> None:
    """Print a line about progress on stderr."""
    print(text, file=sys.stderr, flush=True)


# Statistics


def number(value: float) -> str:
    """Write a number with three significant digits."""
    return f"{value:,.0f}" if value == 0 or abs(value) >= 99.95 else f"{value:#.3g}"


def spread(values: Iterable[float | None]) -> str:
    """Write the median and, of several values, the lowest and the highest; None is left out."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return "".join(map(number, known))
    return f"{number(median(known))} ({number(min(known))} to {number(max(known))})"


def quartiles(values: Sequence[float]) -> str:
    """Write the median and, of several values, the lower and the upper quartile."""
    if len(values) < 2:
        return "".join(map(number, values))
    low, middle, high = map(number, quantiles(values, n=4, method="inclusive"))
    return f"{middle} ({low} to {high})"


def ratio_interval(pairs: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Return the geometric mean of second / first and its 95 % interval: low, mean, high.

    The quantile is that of the next lower tabulated number of pairs, which widens the interval.
    """
    logs = [math.log(second / first) for first, second in pairs]
    degrees = max(n for n in _T_95 if n <= max(1, len(logs) - 1))
    half = _T_95[degrees] * stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else math.inf
    low, middle, high = (math.exp(mean(logs) + shift) for shift in (-half, 0.0, half))
    return low, middle, high


# Markdown


def markdown_table(headings: str, rows: Iterable[Iterable[object]]) -> str:
    """Write a table in Markdown.

    Args:
        headings: Headings with ``|`` between them.
        rows: Cells: text, numbers, or lists of numbers, of which ``spread`` is written.
    """
    lines = [f"| {headings} |", "|---" * (headings.count("|") + 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)])


def _cell(value: object) -> str:
    if isinstance(value, list):
        return spread(value)
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)
