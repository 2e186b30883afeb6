"""Captured step: a whole optimizer step as one CUDA graph, checked against eager steps.

A graph repeats the kernels of a step without Python, with the same memory: inputs are copied to
where it reads them, the rate comes from a table, and what it leaves behind goes into a ring that
the periodic sync reads. The host owns the step number.
"""

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from typing import Protocol

import torch

from ddp_sgd.data.loader import StepBatches
from ddp_sgd.distributed.collectives import gather_over_ranks
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.capture_check import Moved, find_problem
from ddp_sgd.engine.context import TrainContext
from ddp_sgd.engine.static_batches import GRAPHS_ARE_ON, LEAVE_OUT, StaticBatches
from ddp_sgd.engine.step import Stepper, StepResult
from ddp_sgd.errors import ConfigError, DeviceError
from ddp_sgd.optim.sgd import RateTable

_CHECKED = 3
"""Full steps that are checked before the first replay."""

_UNCHECKED = 5_000
"""Steps between two checks, at least: a check takes the time of some hundred small steps."""

_COPIES = 6
"""Copies of all that a step moves which the check makes, at most."""


class Graph(Protocol):
    """Kernels that are launched together: a CUDA graph, or what takes its place in tests."""

    def capture(self, body: Callable[[], None]) -> None:
        """Record what a function launches; its kernels do not run."""

    def replay(self) -> None:
        """Launch what was recorded."""

    def run_eagerly(self, body: Callable[[], None]) -> None:
        """Call a function where it can be captured afterwards, on a stream of its own."""


class CudaGraph:  # pragma: no cover  # needs CUDA: tests/gpu
    """A ``torch.cuda.CUDAGraph`` and the stream that it is captured on."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def capture(self, body: Callable[[], None]) -> None:
        """Record what a function launches."""
        gc.collect()  # memory that is freed during the capture would belong to the graph
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            body()

    def replay(self) -> None:
        """Launch what was recorded on the current stream."""
        self._graph.replay()

    def run_eagerly(self, body: Callable[[], None]) -> None:
        """Call a function on the stream of the capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()
        torch.cuda.current_stream().wait_stream(self._stream)


def new_graph(device: torch.device) -> Graph:
    """Make a graph of a device.

    Raises:
        ConfigError: It has none.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"{GRAPHS_ARE_ON} the run is on {device.type}, which has no CUDA graphs; set "
            "compute.cuda_graphs=false."
        )
    return CudaGraph()


class CapturedStep:
    """Takes full steps by a graph; those that are ragged or cut short are taken eagerly.

    So are those with another momentum than at the capture, as along a warm-up: the kernel takes it
    from the host.

    The first step of an epoch is checked again, as some are before the first replay: once in some
    thousand steps, and where parameters or buffers have got other memory, which a graph does not
    follow.

    Args:
        stepper: Takes steps eagerly; what it launches is captured.
        moved: What a step moves.
        rates: Rates of the run.
        seed: Seeds all generators for the step with a number.
        first: Batches of a full step.
        steps_per_epoch: Steps of an epoch.
        device: Where the model is.
        progress: Updated at every step.

    Attributes:
        loss_scale: Of the stepper.
    """

    def __init__(  # noqa: PLR0913  # all that varies from step to step
        self,
        stepper: Stepper,
        moved: Moved,
        rates: RateTable,
        seed: Callable[[int], None],
        first: StepBatches,
        *,
        steps_per_epoch: int,
        device: torch.device,
        progress: ProgressTracker,
    ) -> None:
        self.loss_scale = stepper.loss_scale
        self._stepper = stepper
        self._moved = moved
        self._rates = rates
        self._seed = seed
        self._steps_per_epoch = steps_per_epoch
        self._device = device
        self._progress = progress
        self._graph: Graph | None = None
        self._momentum = stepper.momentum
        self._full = StaticBatches(first, device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._step_on_device = -1
        self._next_check = first.step + 1
        self._pointers: list[int] = []
        self._rows = torch.zeros(0)
        self._results: list[StepResult] = []

    def step(self, batches: StepBatches, lr: float | torch.Tensor) -> StepResult:
        """Take one step.

        Args:
            batches: This rank's part of the step.
            lr: Rate of this step, for an eager one.

        Raises:
            DeviceError: A replay that was checked differs from the eager step; the state is that
                before the step.
        """
        is_other = self._stepper.momentum != self._momentum
        size = self._full.batches.samples
        if is_other or batches.samples != size or not self._full.fill(batches):
            return self._stepper.step(batches, lr)
        if self._is_to_be_checked(batches.step) and (problem := self._find_problem(batches)):
            raise DeviceError(
                f"{GRAPHS_ARE_ON} the step {problem}, at step {batches.step}, after earlier ones "
                "did not; go on from the last checkpoint with compute.cuda_graphs=false."
            )
        self._progress.enter(Phase.FORWARD, batches.step)
        return self._replay(batches)

    def _is_to_be_checked(self, step: int) -> bool:
        """Whether a step begins an epoch, and enough were not checked, or memory has moved."""
        if step % self._steps_per_epoch:
            return False
        if step < self._next_check and self._pointers == self._moved.pointers():
            return False
        self._next_check = step + _UNCHECKED
        return True

    def check(self, samples: Iterable[StepBatches]) -> None:
        """Capture the step, and compare replays with eager steps; the state stays as it is.

        Args:
            samples: Some full steps, at least one.

        Raises:
            ConfigError: The step cannot be captured, or would not be repeated as it is.
        """
        for batches in samples:
            if problem := self._find_problem(batches):
                raise ConfigError(f"{GRAPHS_ARE_ON} the step {problem}; change that, {LEAVE_OUT}.")

    def _find_problem(self, batches: StepBatches) -> str:
        """Compare a replay with eager steps; empty if all agree."""
        graph = self._graph or new_graph(self._device)

        def capture() -> None:
            if self._graph is None:
                self._capture(graph)

        def replay() -> torch.Tensor:
            if not self._full.fill(batches):
                raise ConfigError(
                    f"{GRAPHS_ARE_ON} batches have tensors of changing shapes; {LEAVE_OUT[3:]}."
                )
            return torch.stack(self._replay(batches).tensors())

        try:
            return find_problem(
                self._moved,
                lambda: self._seed(batches.step),
                lambda: self._take_eagerly(graph, batches),
                capture,
                replay,
            )
        finally:
            self._step_on_device = -1

    def _take_eagerly(self, graph: Graph, batches: StepBatches) -> torch.Tensor:
        results: list[StepResult] = []
        rate = self._rates.at(batches.step)
        graph.run_eagerly(lambda: results.append(self._stepper.step(batches, rate)))
        numbers = torch.stack(results[0].tensors())
        if not len(self._rows):
            shape = RateTable.SIZE, len(numbers)
            self._rows = torch.zeros(shape, dtype=numbers.dtype, device=self._device)
            self._results = [results[0].with_tensors(row.unbind()) for row in self._rows.unbind()]
        return numbers

    def _capture(self, graph: Graph) -> None:
        try:
            graph.capture(self._body)
        except Exception as error:  # any error of a user's model
            raise ConfigError(
                f"{GRAPHS_ARE_ON} the step cannot be captured, {type(error).__name__}: {error}; do "
                f"not let values of the device decide on the host, such as by if, {LEAVE_OUT}."
            ) from error
        self._graph = graph
        self._pointers = self._moved.pointers()

    def _body(self) -> None:
        """Take a step as the graph does: all that varies comes from memory on the device."""
        rate = self._rates.values.index_select(0, self._slot)[0]
        result = self._stepper.step(self._full.batches, rate)
        self._rows.index_copy_(0, self._slot, torch.stack(result.tensors())[None])
        self._slot.add_(1)

    def _replay(self, batches: StepBatches) -> StepResult:
        if self._graph is None:
            raise RuntimeError("the step was not captured")
        slot = batches.step % RateTable.SIZE
        self._rates.load(batches.step)
        if self._step_on_device != batches.step or slot == 0:
            self._slot.fill_(slot)
        self._graph.replay()
        self._step_on_device = batches.step + 1
        return self._results[slot]


def capture_step(
    context: TrainContext,
    rates: RateTable | None,
    seed_for_step: Callable[[int], int],
    notice: Callable[[str], None],
) -> TrainContext:
    """Capture the full steps of a run, if they can be repeated as they are.

    Args:
        context: The run, before its first step; its state stays as it is.
        rates: Rates of the run; None for parameters in double precision, which have no table.
        seed_for_step: Seed of what the model draws in a step, on this rank.
        notice: Receives a line where steps stay eager, since none is full, or the memory of the
            device is too small for the check.

    Returns:
        The run with the stepper that replays.

    Raises:
        ConfigError: The step cannot be captured.
    """
    runtime, plan, stepper = context.runtime, context.plan, context.stepper
    if not isinstance(stepper, Stepper):
        raise TypeError("the steps are captured already")
    new_graph(runtime.device)
    refuse_gloo(runtime)
    if rates is None:
        raise ConfigError(f"{GRAPHS_ARE_ON} parameters are float64; use float32, {LEAVE_OUT}.")
    moved = Moved(
        (context.wrapper.inner, *context.loss_modules.values()),
        context.randomness.generators,
        {
            **_by_name("momentum of", context.optimizer.state_dict()["momentum_buffer"]),
            **_by_name("loss", stepper.loss_scale.state_dict() if stepper.loss_scale else {}),
        },
    )
    complete = (each for each in context.peek() if each.samples == plan.global_batch)
    full = list(islice(complete, _CHECKED))
    lacking = _lacking_memory(moved, runtime)
    if not full or lacking:
        why = lacking or f"no step has all {plan.global_batch} samples of the global batch"
        notice(f"steps are not captured: {why}")
        return context
    step = CapturedStep(
        stepper,
        moved,
        rates,
        lambda number: context.randomness.seed(seed_for_step(number)),
        full[0],
        steps_per_epoch=plan.steps_per_epoch,
        device=runtime.device,
        progress=context.progress,
    )
    step.check(full)
    if context.after_step is not None:
        context.after_step.fix_addresses()
    context.shares.begin()  # the check was no training
    return replace(context, stepper=step)


def refuse_gloo(runtime: Runtime) -> None:
    """Raise if gradients go between ranks on the host, which a graph cannot repeat.

    Raises:
        ConfigError: They do.
    """
    if not runtime.alone and runtime.backend == "gloo":
        raise ConfigError(
            f"{GRAPHS_ARE_ON} gradients go between ranks by gloo, on the host; use nccl, "
            f"{LEAVE_OUT}."
        )


def _lacking_memory(moved: Moved, runtime: Runtime) -> str:
    """Describe that the copies of a check do not fit into memory, on any rank, if it is so."""
    lacking = ""
    if runtime.device.type == "cuda":  # pragma: no cover
        tensors = [p for module in moved.modules for p in (*module.parameters(), *module.buffers())]
        needed = _COPIES * sum(each.nbytes for each in (*tensors, *moved.others.values()))
        free, _ = torch.cuda.mem_get_info(runtime.device)
        free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        if needed > free:
            lacking = f"checking that needs {needed / 2**20:.0f} MiB of {free / 2**20:.0f} free"
    return next(filter(None, gather_over_ranks(lacking, runtime)), "")


def _by_name(what: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{what} {name}": tensor for name, tensor in tensors.items()}
