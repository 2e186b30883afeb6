"""One rank of ``benchmarks.ranks``: trains, and tells what a step cost it, by phase."""

import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Lock
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ddp_sgd import RunConfig, fit, start_runtime
from ddp_sgd.data import Digits
from ddp_sgd.data.datasets import InMemory
from ddp_sgd.distributed import collectives
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import setup
from ddp_sgd.seeds import Randomness

BATCH = 32
WARM_UP, GETTING_WARM = 100, 50
"""Steps before the measurement; how many of them a rank takes after its turn has come."""
KINDS = {
    Phase.FORWARD: "compute",
    Phase.BACKWARD: "compute",
    Phase.OPTIMIZER: "compute",
    Phase.ALL_REDUCE: "all-reduce",
    Phase.DATA: "data",
    Phase.SYNC: Phase.SYNC,
}

Costs = dict[str, float]
"""What a step costs a rank: by kind of phase, and ``others``, the other threads of the process."""


class Tiled:
    """Rows again and again, n in all, in the memory of one copy: caches see the same at any n."""

    def __init__(self, rows: torch.Tensor, length: int) -> None:
        self.rows = rows
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
    place: tuple[int, int, int],
    steps: int,
    folder: str,
    sender: Connection,
    *,
    turn: Lock | None,
    counting: bool,
) -> None:
    """Train as one of the ranks and send what a step costs.

    Args:
        place: Rank, world size, and the port where ranks meet.
        steps: Steps to measure.
        folder: Where the run writes.
        sender: Where the costs go.
        turn: Held by the one rank that measures; None measures all at the same time.
        counting: Whether bytecodes are what it costs, instead of CPU time.
    """
    rank, world_size, _ = place
    names = ("RANK", "WORLD_SIZE", "MASTER_PORT")
    os.environ.update({name: str(value) for name, value in zip(names, place, strict=True)})
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    digits, samples = Digits(), (WARM_UP + steps + 1) * BATCH * world_size
    targets = torch.from_numpy(digits.targets).repeat(samples // len(digits) + 1)[:samples]
    clock = Bytecodes() if counting else time.thread_time
    meter = Meter(clock, WARM_UP, WARM_UP + steps, turn)
    inputs = Tiled(torch.from_numpy(digits.inputs), samples)
    setup.ProgressTracker = lambda: meter.progress  # type: ignore[assignment,misc]
    Randomness.seed = meter.before_seeding(Randomness.seed)  # type: ignore[method-assign]
    sections = {"output_dir": folder, "epochs": 1, "wandb": {"mode": "disabled"}}
    config = RunConfig.model_validate({**sections, "data": {"batch_size": BATCH}})
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stdout(nowhere),
        start_runtime(device="cpu") as runtime,
    ):
        fit(config, runtime, train_set=InMemory(inputs, targets))
    sys.settrace(None)
    sender.send(meter.costs())
