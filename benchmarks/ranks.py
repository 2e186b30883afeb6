"""CPU time of a step and rank on 1 to 16 ranks of one machine, by what it is spent on.

Usage: ``python -m benchmarks.ranks [--rounds 3] [--steps 300]``; a round takes about 2 minutes.

The digits MLP, 32 samples per rank and step, gloo, a row of metrics every 10 steps. All ranks share
the cores, so wall time says nothing: each training thread is measured by its own CPU clock, phase
by phase, in microseconds per step: median over ranks, then over rounds. `rest` is what is neither
compute nor all-reduce of gradients: reading data and the sync, with its own small all-reduce. Rank
0 also writes the journal. Three measurements, rank counts in turn:

* together: all ranks train. Who waits for another rank finds the caches full of its things;
* one at a time: each rank in turn takes the same steps while the others stand still, and its
  all-reduces give zeros at once. So caches are as warm on 16 ranks as on 2;
* bytecodes instead of time: no cache and no neighbour changes them.
"""

import multiprocessing
import sys
import tempfile
import time
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.synchronize import Lock
from statistics import median
from types import FrameType
from typing import Any

import torch
from ranks import run_ranks

from benchmarks import harness
from ddp_sgd.data import Digits
from ddp_sgd.data.datasets import InMemory
from ddp_sgd.distributed import collectives
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.seeds import Randomness

RANKS = (1, 2, 4, 8, 16)
BATCH = 32
WARM_UP, GETTING_WARM = 100, 50
"""Steps before the measurement; how many of them a rank takes after its turn has come."""
COUNTED = 200
"""Steps in which bytecodes are counted."""
KINDS = {
    Phase.FORWARD: "compute",
    Phase.BACKWARD: "compute",
    Phase.OPTIMIZER: "compute",
    Phase.ALL_REDUCE: "all-reduce",
    Phase.DATA: "data",
    Phase.SYNC: "sync",
}
REST = ("data", "sync")

Costs = dict[str, float]
"""What a step costs a rank: by kind of phase, and ``others``, the other threads of the process."""
Round = list[Costs]
"""Costs of the ranks of one run."""


def measure(options: Namespace) -> Iterator[str]:
    """Measure everything, in turn; bytecodes once, since they do not vary."""
    together = {number: partial(run, number, options.steps) for number in options.ranks}
    alone = {
        number: partial(run, number, options.steps, in_turns=True)
        for number in options.ranks
        if number > 1
    }
    counted = {number: partial(run, number, COUNTED, counting=True) for number in options.ranks}
    yield from report(
        harness.alternate(together, options.rounds),
        harness.alternate(alone, options.rounds),
        harness.alternate(counted, 1),
    )


def run(world_size: int, steps: int, *, in_turns: bool = False, counting: bool = False) -> Round:
    """Return what a step costs each rank.

    Args:
        world_size: Number of ranks.
        steps: Steps to measure.
        in_turns: Whether one rank after the other measures, while the others stand still.
        counting: Whether bytecodes are what a step costs, instead of CPU time.
    """
    turn = multiprocessing.get_context("forkserver").Lock() if in_turns else None
    with tempfile.TemporaryDirectory() as folder:
        return run_ranks(world_size, work_as_rank, steps, folder, turn, counting, deadline_s=600.0)


class Tiled:
    """Rows again and again, n in all, in the memory of one copy: caches see the same at any n."""

    def __init__(self, rows: torch.Tensor, length: int) -> None:
        self.rows = rows
        self.device = rows.device
        self.length = length

    def __len__(self) -> int:
        return self.length

    def index_select(self, dim: int, indices: torch.Tensor) -> torch.Tensor:
        """Return rows by number, as a tensor does."""
        return self.rows.index_select(dim, indices % len(self.rows))


class Meter:
    """Costs of the steps between two steps, on this rank.

    Args:
        clock: What a cost is, of the training thread.
        first: Step at which the measurement begins.
        last: Step at which it ends.
        turn: Whoever holds it measures while all others stand still; instead of a sum, in which
            they would have to take part, it gets zeros, as all do. None measures all ranks at
            the same time.
    """

    def __init__(
        self, clock: Callable[[], float], first: int, last: int, turn: Lock | None
    ) -> None:
        self.progress = ProgressTracker(clock)
        self.first = first
        self.last = last
        self.turn = turn
        self.seen: dict[int, Costs] = {}
        self.looks = {last: self._stop, first: self._note, first - GETTING_WARM: self._start}

    def look(self) -> None:
        """Do what is due at this step, once."""
        due = self.looks.pop(self.progress.step, None)
        if due is not None:
            due()

    def before_seeding(self, seed: Callable[..., None]) -> Callable[..., None]:
        """Look at every step, when its data have been read and the model is seeded."""

        def look_and_seed(*arguments: Any, **options: Any) -> None:
            self.look()
            seed(*arguments, **options)

        return look_and_seed

    def costs(self) -> Costs:
        """Return millionths a step."""
        before, after = self.seen[self.first], self.seen[self.last]
        costs: Costs = defaultdict(float)
        for phase, total in after.items():
            kind = KINDS.get(phase, phase)
            costs[kind] += 1e6 * (total - before.get(phase, 0.0)) / (self.last - self.first)
        return dict(costs)

    def _start(self) -> None:
        if self.turn is not None:
            self.turn.acquire()
            self._sum, collectives.sum_by_doubling = collectives.sum_by_doubling, _zero

    def _note(self) -> None:
        others = time.process_time() - time.thread_time()
        spent = self.progress.spent_s()
        self.seen[self.progress.step] = {"others": others, "wall": time.perf_counter(), **spent}

    def _stop(self) -> None:
        self._note()
        if self.turn is not None:
            collectives.sum_by_doubling = self._sum
            self.turn.release()


def _zero(tensor: torch.Tensor, _: Runtime) -> None:
    tensor.zero_()


class Bytecodes:
    """A clock that counts the instructions of the interpreter in this thread, in millionths."""

    def __init__(self) -> None:
        self.count = 0
        sys.settrace(self._trace)

    def __call__(self) -> float:
        """Return how many there were."""
        return self.count / 1e6

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        self.count += event == "opcode"
        return self._trace


def work_as_rank(
    runtime: Runtime,
    steps: int,
    folder: str,
    turn: Lock | None,
    counting: bool,  # noqa: FBT001
) -> Costs:
    """Train as one of the ranks; return what a step costs. With a turn, who holds it measures."""
    digits, samples = Digits(), (WARM_UP + steps + 1) * BATCH * runtime.world_size
    targets = torch.from_numpy(digits.targets).repeat(samples // len(digits) + 1)[:samples]
    clock = Bytecodes() if counting else time.thread_time
    meter = Meter(clock, WARM_UP, WARM_UP + steps, turn)
    inputs = Tiled(torch.from_numpy(digits.inputs), samples)
    Randomness.seed = meter.before_seeding(Randomness.seed)  # type: ignore[method-assign]
    sections = {"output_dir": folder, "epochs": 1, "wandb": {"mode": "disabled"}}
    train_set = InMemory(inputs, targets)
    harness.fit_with(meter.progress, runtime, train_set, data={"batch_size": BATCH}, **sections)
    sys.settrace(None)
    return meter.costs()


def rest(costs: Costs) -> float:
    """Return what is neither compute nor all-reduce."""
    return sum(costs[kind] for kind in REST)


def over_ranks(found: Round, kind: str) -> float:
    """Return the median cost of a kind over all ranks."""
    return median(costs[kind] for costs in found)


def table(title: str, runs: dict[int, list[Round]]) -> str:
    """Write what a step costs, by number of ranks; each figure is a median over the rounds."""

    def rows() -> Iterator[list[object]]:
        rests = {n: [median(map(rest, found)) for found in rounds] for n, rounds in runs.items()}
        firsts = {n: [rest(found[0]) for found in rounds] for n, rounds in runs.items()}
        for n, rounds in runs.items():
            compute, *kinds = (
                median(over_ranks(found, kind) for found in rounds)
                for kind in ("compute", "all-reduce", *REST)
            )
            change = [
                f"{100 * (median(of[n]) / median(of[2]) - 1):+.1f} %" if n > 2 else ""
                for of in (rests, firsts)
            ]
            share = median(rests[n]) / compute
            yield [n, compute, *kinds, rests[n], change[0], share, firsts[n], change[1]]

    headings = f"ranks, {title} | compute | all-reduce | reading data | sync | rest"
    headings += " | against 2 ranks | of compute | rest of rank 0 | against 2 ranks"
    return harness.markdown_table(headings, rows())


def report(
    together: dict[int, list[Round]], alone: dict[int, list[Round]], counted: dict[int, list[Round]]
) -> Iterator[str]:
    """Write the result."""
    yield table("together", together)
    for what, kind, scale in (
        ("Other threads of a rank, most of them gloo's, in microseconds of CPU", "others", 1.0),
        ("Wall time in ms", "wall", 1e-3),
    ):
        costs = {n: median(over_ranks(r, kind) for r in rounds) for n, rounds in together.items()}
        shown = ", ".join(f"{harness.number(scale * cost)} on {n}" for n, cost in costs.items())
        yield f"{what} per step: {shown} ranks."
    yield table("one at a time", alone)
    yield table("bytecodes", counted)


if __name__ == "__main__":
    parser = harness.option_parser(__doc__, rounds=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="2 among them")
    harness.run_benchmark("ranks", parser, measure)
