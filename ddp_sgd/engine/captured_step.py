"""Captured step: a whole optimizer step as one CUDA graph, checked against eager steps.

A graph repeats the kernels of a step without Python, with the same memory: inputs are copied to
where it reads them, the rate comes from a table, and what it leaves behind goes into a ring that
the periodic sync reads. The host owns the step number.
"""

import gc
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from ddp_sgd.data.loader import MicroBatch, StepBatches
from ddp_sgd.distributed.progress import Phase, ProgressTracker
from ddp_sgd.engine.buffers import buffers_by_name
from ddp_sgd.engine.side_effects import SideEffects
from ddp_sgd.engine.step import Stepper, StepResult
from ddp_sgd.errors import ConfigError, DeviceError
from ddp_sgd.losses import wide_float
from ddp_sgd.optim.sgd import RateTable
from ddp_sgd.tree import leaves, map_leaves

_NOISE = 4.0
"""How many times farther from an eager step a replay may be than another eager step is, where
kernels are not deterministic."""

_KEY = "compute.cuda_graphs is true while"
_LEAVE = "or set compute.cuda_graphs=false"


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
        self._stream = torch.cuda.Stream()

    def capture(self, body: Callable[[], None]) -> None:
        """Record what a function launches."""
        gc.collect()  # memory that is freed during the capture would belong to the graph
        with torch.cuda.graph(
            self._graph, stream=self._stream, capture_error_mode="thread_local"
        ):
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


def new_graph() -> Graph:
    """Make a graph of the current device."""
    return CudaGraph()


class Moved(NamedTuple):
    """What a step moves.

    Args:
        modules: The model, and the modules of the loss.
        generators: Generators that a step draws from.
        others: Tensors besides parameters and buffers by name, such as momentum buffers; they are
            written in place.
    """

    modules: Sequence[nn.Module]
    generators: Sequence[torch.Generator]
    others: dict[str, torch.Tensor]


class CapturedStep:
    """Takes full steps by a graph; those that are ragged or cut short are taken eagerly.

    The first step of an epoch is checked again, as all are before the first replay.

    Args:
        stepper: Takes steps eagerly; what it launches is captured.
        moved: What a step moves.
        rates: Rates of the run.
        seed: Seeds all generators for the step with a number.
        first: Batches of a full step.
        steps_per_epoch: Steps of an epoch.
        device: Where the model is.
        progress: Updated at every step.

    Raises:
        ConfigError: The step cannot be captured.
    """

    def __init__(
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
        self._stepper = stepper
        self._moved = moved
        self._rates = rates
        self._seed = seed
        self._steps_per_epoch = steps_per_epoch
        self._device = device
        self._progress = progress
        self._graph: Graph | None = None
        self._full = _StaticBatches(first, device)
        self._slot = torch.zeros(1, dtype=torch.int64, device=device)
        self._step_on_device = -1
        self._rows = torch.zeros(0)
        self._weights: list[int] = []
        self._draws_on_host = False

    def step(self, batches: StepBatches, lr: float | torch.Tensor) -> StepResult:
        """Take one step.

        Args:
            batches: This rank's part of the step.
            lr: Rate of this step, for an eager one.

        Raises:
            DeviceError: A replay that was checked differs from the eager step; the state is that
                before the step.
        """
        if not self._full.fit(batches):
            return self._stepper.step(batches, lr)
        if batches.step % self._steps_per_epoch == 0 and (problem := self._find_problem(batches)):
            raise DeviceError(
                f"{_KEY} the step {problem}, at step {batches.step}, after earlier ones did not; go "
                f"on from the last checkpoint with compute.cuda_graphs=false."
            )
        self._progress.enter(Phase.FORWARD, batches.step)
        return self._replay(batches)

    def check(self, samples: Iterable[StepBatches]) -> None:
        """Capture the step, and compare replays with eager steps; the state stays as it is.

        Args:
            samples: Some full steps, at least one.

        Raises:
            ConfigError: The step cannot be captured, or would not be repeated as it is.
        """
        for batches in samples:
            if problem := self._find_problem(batches):
                raise ConfigError(f"{_KEY} the step {problem}; change that, {_LEAVE}.")

    def _find_problem(self, batches: StepBatches) -> str:
        """Take a step twice eagerly and once by replay, from one state; empty if all agree."""
        effects = SideEffects(self._moved.modules, self._moved.generators)
        others = {name: tensor.clone() for name, tensor in self._moved.others.items()}

        def put_back() -> None:
            effects.undo(attributes=False)
            for name, tensor in self._moved.others.items():
                tensor.copy_(others[name])

        graph = self._graph or new_graph()
        try:
            first = self._run_eagerly(graph, batches)
            put_back()
            effects.keep_attributes()  # the first pass may have filled caches
            again = self._run_eagerly(graph, batches)
            if self._draws_on_host:
                return "draws from random or numpy.random, which a graph repeats; draw by torch"
            if names := effects.changed_attributes():
                return (
                    f"sets {names[0]}, which stays on the host; use a buffer that is written in "
                    "place"
                )
            put_back()
            if self._graph is None:
                self._capture(graph)
                put_back()
                effects.undo()
            self._seed(batches.step)
            self._replay(batches)
            return _difference(first, again, self._state())
        finally:
            put_back()
            effects.undo()
            self._step_on_device = -1

    def _run_eagerly(self, graph: Graph, batches: StepBatches) -> dict[str, torch.Tensor]:
        results: list[StepResult] = []
        rate = self._rates.at(batches.step)
        self._seed(batches.step)
        before = random.getstate(), _numpy_state()
        graph.run_eagerly(lambda: results.append(self._stepper.step(batches, rate)))
        self._draws_on_host = before != (random.getstate(), _numpy_state())
        numbers = torch.stack([each.to(wide_float(self._device)) for each in results[0].tensors()])
        if not len(self._rows):
            self._rows = torch.zeros(
                (RateTable.SIZE, len(numbers)), dtype=numbers.dtype, device=self._device
            )
            self._weights = results[0].weights
        self._rows[batches.step % RateTable.SIZE] = numbers
        return self._state()

    def _state(self) -> dict[str, torch.Tensor]:
        """Copy all that a step moves, by name, and what steps left behind."""
        roots = {str(number): module for number, module in enumerate(self._moved.modules)}
        tensors = {"loss and norm": self._rows, **self._moved.others}
        for where, root in roots.items():
            tensors |= {f"parameter {where}.{n}": p for n, p in root.named_parameters()}
        for name, (module, key) in buffers_by_name(roots).items():
            if (buffer := module._buffers[key]) is not None:
                tensors[f"buffer {name}"] = buffer
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def _capture(self, graph: Graph) -> None:
        try:
            graph.capture(self._body)
        except Exception as error:  # any error of a user's model
            raise ConfigError(
                f"{_KEY} the step cannot be captured, {type(error).__name__}: {error}; let no "
                f"value of the device decide on the host, such as by .item() or if, {_LEAVE}."
            ) from error
        self._graph = graph

    def _body(self) -> None:
        """Take a step as the graph does: all that varies comes from memory on the device."""
        rate = self._rates.values.index_select(0, self._slot)[0]
        result = self._stepper.step(self._full.batches, rate)
        numbers = torch.stack([each.to(self._rows.dtype) for each in result.tensors()])
        self._rows.index_copy_(0, self._slot, numbers[None])
        self._slot.add_(1).remainder_(RateTable.SIZE)

    def _replay(self, batches: StepBatches) -> StepResult:
        if self._graph is None:
            raise RuntimeError("the step was not captured")
        slot = batches.step % RateTable.SIZE
        self._rates.load(batches.step)
        self._full.fill(batches)
        if self._step_on_device != batches.step:
            self._slot.fill_(slot)
        self._graph.replay()
        self._step_on_device = batches.step + 1
        *losses, norm = self._rows[slot].unbind()
        return StepResult(losses, self._weights, batches.samples, sum(self._weights), norm)


class _StaticBatches:
    """Micro-batches of a full step in memory that stays where it is.

    Args:
        first: Batches of a full step.
        device: Where the memory is.

    Attributes:
        batches: The micro-batches, on the device.
    """

    def __init__(self, first: StepBatches, device: torch.device) -> None:
        self.batches = first._replace(
            micro_batches=tuple(_static(batch, device) for batch in first.micro_batches)
        )
        self._device = device
        self._tensors = _tensors(self.batches.micro_batches)
        self._form = _form(first)

    def fit(self, batches: StepBatches) -> bool:
        """Whether a step has the same numbers of samples, and tensors of the same shapes."""
        return _form(batches) == self._form

    def fill(self, batches: StepBatches) -> None:
        """Copy the micro-batches of a step; nothing waits for the device."""
        new = _tensors(tuple(batch.to(self._device) for batch in batches.micro_batches))
        torch._foreach_copy_(self._tensors, new)


def _static(batch: MicroBatch, device: torch.device) -> MicroBatch:
    def keep(leaf: Any) -> torch.Tensor:
        if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
            raise ConfigError(
                f"{_KEY} a batch holds a {type(leaf).__name__}; let data.train give tensors, in "
                f"containers of Python's own, {_LEAVE}."
            )
        return torch.empty_like(leaf, device=device).copy_(leaf)

    return batch._replace(
        inputs=map_leaves(keep, batch.inputs), targets=map_leaves(keep, batch.targets)
    )


def _tensors(micro_batches: Sequence[MicroBatch]) -> list[torch.Tensor]:
    return [leaf for each in micro_batches for _, leaf in leaves((each.inputs, each.targets))]


def _form(batches: StepBatches) -> tuple[Any, ...]:
    tensors = _tensors(batches.micro_batches)
    sizes = [each.samples for each in batches.micro_batches]
    return batches.samples, sizes, [(each.shape, each.dtype) for each in tensors]


def _numpy_state() -> tuple[int, bytes]:
    state: Any = np.random.get_state(legacy=False)  # of the global generator, which models use
    return state["state"]["pos"], state["state"]["key"].tobytes()


def _difference(
    first: dict[str, torch.Tensor], again: dict[str, torch.Tensor], replayed: dict[str, torch.Tensor]
) -> str:
    """Describe how a replay differs from eager steps; empty if it does not, beyond their noise."""
    noise = max(_distance(first[name], again[name]) for name in first)
    for name, tensor in first.items():
        distance = _distance(tensor, replayed[name])
        if distance > _NOISE * noise:
            return (
                f"is not repeated by its graph ({name} differs by {distance:.1e} of its largest "
                "number): a replay calls no Python, and reads memory that was there at the capture"
            )
    return ""


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number; 0 for equal ones, with NaN."""
    if one.shape != other.shape:
        return float("inf")
    if torch.equal(one.nan_to_num(), other.nan_to_num()) and torch.equal(one.isnan(), other.isnan()):
        return 0.0
    a, b = one.double(), other.double()
    largest = float(a.abs().nan_to_num().max())
    distance = float((a - b).abs().max()) / (largest or 1.0)
    return distance if distance == distance else float("inf")
