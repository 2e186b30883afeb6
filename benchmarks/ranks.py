"""CPU time of a step and rank on 1 to 16 ranks of one machine, by what it is spent on.

Usage: ``python -m benchmarks.ranks [--rounds 3] [--steps 300] [--write FOLDER]``; a round takes
about 2 minutes. The digits MLP, 32 samples a rank and step, gloo, one thread a rank. All ranks
share the cores, so wall time says nothing: each training thread is measured by its own CPU clock,
phase by phase. Three measurements, rank counts in turn:

* together: all ranks train. Who waits for another rank finds the caches full of its things;
* one at a time: each rank in turn takes the same steps while the others stand still, and its
  all-reduces give zeros at once. So caches are as warm on 16 ranks as on 2;
* bytecodes instead of time: no cache and no neighbour changes them.
"""

import argparse
import multiprocessing
import os
import platform
import socket
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

from benchmarks.rank_costs import BATCH, Costs, work_as_rank

RANKS = (1, 2, 4, 8, 16)
COUNTED = 200
"""Steps in which bytecodes are counted."""
REST = ("data", "sync")

Round = list[Costs]
"""Costs of the ranks of one run."""


def run(world_size: int, steps: int, *, in_turns: bool = False, counting: bool = False) -> Round:
    """Return what a step costs each rank."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "ddp_sgd.engine.fit"])
    ways = {"turn": context.Lock() if in_turns else None, "counting": counting}
    processes, receivers, port = [], [], free_port()
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            place = (rank, world_size, port)
            process = context.Process(
                target=work_as_rank, args=(place, steps, folder, sender), kwargs=ways
            )
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        costs = [receiver.recv() for receiver in receivers]
        for process in processes:
            process.join()
    return costs


def free_port() -> int:
    """Find a port where ranks can meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def rest(costs: Costs) -> float:
    """Return what is neither compute nor all-reduce."""
    return sum(costs[kind] for kind in REST)


def over_ranks(found: Round, kind: str) -> float:
    """Return the median cost of a kind over all ranks."""
    return median(costs[kind] for costs in found)


def rests(rounds: Sequence[Round]) -> tuple[list[float], list[float]]:
    """Return, by round, the median rest of all ranks, and that of rank 0."""
    return [median(map(rest, found)) for found in rounds], [rest(found[0]) for found in rounds]


def table(runs: dict[int, list[Round]], title: str) -> Iterator[str]:
    """Write what a step costs, by number of ranks; each figure is a median over the rounds."""
    yield from (
        f"| ranks, {title} | compute | all-reduce | reading data | heartbeat | rest | lowest to "
        "highest | against 2 ranks | of compute | rest of rank 0 | against 2 ranks |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    )
    baseline = [median(each) for each in rests(runs[2])]
    for number, rounds in runs.items():
        kinds = [
            median(over_ranks(found, kind) for found in rounds)
            for kind in ("compute", "all-reduce", *REST)
        ]
        everyone, first = rests(rounds)
        whole, change = median(everyone), ["", ""]
        if number > 2:
            pairs = zip((whole, median(first)), baseline, strict=True)
            change = [f"{100 * (now / before - 1):+.1f} %" for now, before in pairs]
        cells = [
            *(f"{value:,.1f}" for value in (*kinds, whole)),
            f"{min(everyone):,.1f} to {max(everyone):,.1f}",
            change[0],
            f"{whole / kinds[0]:.2f}",
            f"{median(first):,.1f}",
            change[1],
        ]
        yield f"| {number} | {' | '.join(cells)} |"


def report(runs: dict[str, dict[int, list[Round]]], command: str) -> str:
    """Write the result in Markdown."""
    others, wall_ms = (
        ", ".join(
            f"{scale * median(over_ranks(found, kind) for found in rounds):.{digits}f} on {number}"
            for number, rounds in runs["together"].items()
        )
        for kind, scale, digits in (("others", 1, 0), ("wall", 1e-3, 2))
    )
    return f"""# What a step costs a rank, on 1 to {max(runs["together"])} ranks of one machine

{command}, {os.cpu_count()} CPUs for all ranks, {platform.machine()}, Python \
{platform.python_version()}, torch {version("torch")}, gloo, one thread a rank.

The digits MLP, {BATCH} samples a rank and step, a row of metrics every 10 steps. CPU time of the \
training thread, in microseconds a step and rank: median over ranks, then over rounds. `rest` is \
what is neither compute nor all-reduce of gradients: reading data and the heartbeat, with its own \
small all-reduce. Rank 0 also writes the journal.

{chr(10).join(table(runs["together"], "together"))}

Other threads of a rank, most of them gloo's, take, in microseconds of CPU a step: {others} ranks. \
A step takes, in ms of wall time: {wall_ms} ranks.

One rank at a time, while the others stand still, and without all-reduces:

{chr(10).join(table(runs["in turns"], "one at a time"))}

Bytecodes that the training thread interprets, instead of time, a step and rank:

{chr(10).join(table(runs["counted"], "bytecodes"))}
"""


def measure(numbers: Sequence[int], rounds: int, steps: int) -> dict[str, dict[int, list[Round]]]:
    """Measure everything, in turn, several times; bytecodes once, since they do not vary."""
    several = [number for number in numbers if number > 1]
    runs: dict[str, dict[int, list[Round]]] = {
        "together": {number: [] for number in numbers},
        "in turns": {number: [] for number in several},
        "counted": {number: [] for number in numbers},
    }
    for turn in range(rounds):
        for number in numbers:
            runs["together"][number].append(run(number, steps))
            if turn == 0:
                runs["counted"][number].append(run(number, COUNTED, counting=True))
        for number in several:
            runs["in turns"][number].append(run(number, steps, in_turns=True))
    return runs


def main() -> None:
    """Measure, print, and keep the result if asked to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="2 among them")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    runs = measure(options.ranks, options.rounds, options.steps)
    command = (
        f"`python -m benchmarks.ranks --rounds {options.rounds} --steps {options.steps}`, "
        f"{datetime.now(UTC):%Y-%m-%d}, load average {load:.1f} before"
    )
    text = report(runs, command)
    print(text)
    if options.write:
        path = options.write / f"ranks_{os.cpu_count()}cpu_{datetime.now(UTC):%Y%m}.md"
        path.write_text(text)


if __name__ == "__main__":
    main()
