"""A captured step does what an eager one does; on the CPU another graph calls the step again."""

import random

import numpy as np
import pytest
import torch
from graphs import Again
from torch import nn

from ddp_sgd.data.loader import MicroBatch, StepBatches
from ddp_sgd.distributed.data_parallel import FlatAllReduce
from ddp_sgd.distributed.progress import ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import captured_step as module
from ddp_sgd.engine.buffers import TrainingBuffers, statistics_of
from ddp_sgd.engine.capture_check import Moved
from ddp_sgd.engine.captured_step import CapturedStep
from ddp_sgd.engine.step import Stepper
from ddp_sgd.errors import ConfigError, DeviceError
from ddp_sgd.losses import Objective
from ddp_sgd.optim.sgd import RateTable, build_sgd
from ddp_sgd.seeds import Randomness, seed_for

STEPS, SAMPLES, EPOCH = 12, 6, 4
X = torch.randn(STEPS * SAMPLES, 3, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (STEPS * SAMPLES,), generator=torch.Generator().manual_seed(2))


class Stale(Again):
    """A graph whose replay misses what changed on the host since the capture."""

    def __init__(self, replay):
        self.replay = replay

    def capture(self, body):
        pass


@pytest.fixture(autouse=True)
def graph_of_the_cpu(monkeypatch):
    monkeypatch.setattr(module, "new_graph", lambda _: Again())


def batches(step, accumulate=1, samples=SAMPLES, x=X):
    at = slice(step * SAMPLES, step * SAMPLES + samples)
    parts = list(zip(x[at].chunk(accumulate), Y[at].chunk(accumulate), strict=True))
    return StepBatches(
        step,
        samples,
        tuple(
            MicroBatch(inputs, targets, len(inputs), is_last=number == len(parts) - 1)
            for number, (inputs, targets) in enumerate(parts)
        ),
    )


class Run:
    """A model with its stepper, eager or captured, whose rate falls with the step."""

    def __init__(self, model, *, captured, accumulate=1, start=0, **options):
        runtime = Runtime()
        self.model, self.accumulate, self.captured = model, accumulate, captured
        self.optimizer = build_sgd(model, momentum=0.9, weight_decay=0.01)
        self.randomness = Randomness(runtime.device)
        self.rates = RateTable(lambda step: 0.1 / (1 + step), STEPS, runtime.device)
        buffers = TrainingBuffers(statistics_of([model]), [], runtime)
        progress = ProgressTracker()
        self.stepper = Stepper(
            FlatAllReduce(model, runtime),
            Objective(nn.CrossEntropyLoss(), Y),
            self.optimizer,
            runtime,
            progress,
            buffers=buffers,
            **options,
        )
        if captured:
            self.stepper = CapturedStep(
                self.stepper,
                Moved(
                    [model],
                    self.randomness.generators,
                    self.optimizer.state_dict()["momentum_buffer"],
                ),
                self.rates,
                self.seed,
                batches(start, accumulate),
                steps_per_epoch=EPOCH,
                device=runtime.device,
                progress=progress,
            )
            self.stepper.check(batches(step, accumulate) for step in range(start, start + 3))

    def seed(self, step):
        self.randomness.seed(seed_for("model", 0, step))

    def step(self, step, **options):
        self.seed(step)
        return self.stepper.step(batches(step, self.accumulate, **options), self.rates.at(step))

    def state(self):
        momentum = self.optimizer.state_dict()["momentum_buffer"]
        return {**self.model.state_dict(), **{f"momentum {n}": t for n, t in momentum.items()}}


def build(kind):
    torch.manual_seed(0)
    if kind == "dropout":
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4))
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def assert_equal(one, other):
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("kind", ["dropout", "batch norm"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.05}])
def test_captured_steps_give_the_bits_of_eager_ones(kind, accumulate, options):
    runs = [Run(build(kind), captured=c, accumulate=accumulate, **options) for c in (False, True)]
    poisoned = X.clone()
    poisoned[7 * SAMPLES] = torch.nan
    for step in range(STEPS):
        how = {3: {"samples": 4}, 7: {"x": poisoned}}.get(step, {})  # ragged; not finite
        results = [run.step(step, **how) for run in runs]
        numbers = [torch.stack(result.tensors()) for result in results]
        assert torch.equal(*(each.double().nan_to_num() for each in numbers))
        assert results[0].weights == results[1].weights
        assert results[0].units == results[1].units
        assert results[0].local_units == results[1].local_units
        assert_equal(*(run.state() for run in runs))


def test_the_ring_of_results_begins_again(monkeypatch):
    monkeypatch.setattr(RateTable, "SIZE", 5)  # of twelve steps
    runs = [Run(build("dropout"), captured=captured) for captured in (False, True)]
    for step in range(STEPS):
        assert torch.equal(*(torch.stack(run.step(step).tensors()) for run in runs))
    assert_equal(*(run.state() for run in runs))


def test_a_run_that_begins_in_the_middle_goes_on_alike():
    whole = Run(build("dropout"), captured=True)
    for step in range(5):
        whole.step(step)
    model = build("dropout")
    model.load_state_dict(whole.model.state_dict())
    later = Run(model, captured=True, start=5)
    later.optimizer.load_state_dict(whole.optimizer.state_dict())
    for step in range(5, STEPS):
        assert torch.equal(*(torch.stack(run.step(step).tensors()) for run in (whole, later)))
    assert_equal(whole.state(), later.state())


def test_the_check_leaves_no_trace():
    model = build("batch norm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = Run(model, captured=True)
    assert_equal(model.state_dict(), before)
    assert all(not t.any() for t in run.optimizer.state_dict()["momentum_buffer"].values())


class Counting(nn.Linear):
    calls = 0

    def forward(self, inputs):
        self.calls += 1
        return super().forward(inputs)


class Caching(nn.Linear):
    """Computes something once; that is no state."""

    scale = None

    def forward(self, inputs):
        if self.scale is None:
            self.scale = torch.full((3,), 0.5)
        return super().forward(inputs * self.scale)


class Remembering(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.history = []

    def forward(self, inputs):
        self.history.append(float(inputs.mean()))
        return super().forward(inputs)


class DropsByRandom(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) * (random.random() > 0.5)


class DropsByNumpy(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs) * float(np.random.rand() > 0.5)


class Scheduled(nn.Linear):
    """Does something else from the second step on."""

    step = 0

    def forward(self, inputs):
        self.step += 1
        return super().forward(inputs) * (2.0 if self.step > 1 else 1.0)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Counting, "sets Counting.calls"),
        (Remembering, "sets Remembering.history"),
        (Scheduled, "sets Scheduled.step"),
        (DropsByRandom, r"draws from random or numpy\.random"),
        (DropsByNumpy, r"draws from random or numpy\.random"),
    ],
)
def test_what_a_graph_would_not_repeat_is_refused(kind, reason):
    model = kind(3, 4)
    weight = model.weight.detach().clone()
    with pytest.raises(
        ConfigError, match=rf"^compute\.cuda_graphs is true while the step {reason}"
    ):
        Run(model, captured=True)
    assert torch.equal(model.weight, weight)


def test_a_cache_is_no_state():
    run = Run(Caching(3, 4), captured=True)
    run.step(0)


def test_a_capture_that_fails_leaves_the_state(monkeypatch):
    class Broken(Again):
        def capture(self, body):
            body()
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(module, "new_graph", lambda _: Broken())
    model = build("batch norm")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = random.getstate()
    with pytest.raises(ConfigError, match=r"cannot be captured, RuntimeError: operation not"):
        Run(model, captured=True)
    assert_equal(model.state_dict(), before)
    assert random.getstate() == state


def test_a_replay_that_does_nothing_is_found(monkeypatch):
    monkeypatch.setattr(module, "new_graph", lambda _: Stale(lambda: None))
    with pytest.raises(ConfigError, match="is not repeated by its graph .* differs by"):
        Run(build("dropout"), captured=True)


def test_the_first_step_of_an_epoch_is_checked_again(monkeypatch):
    monkeypatch.setattr(module, "_UNCHECKED", 2 * EPOCH)
    run = Run(build("dropout"), captured=True)
    for step in range(EPOCH):
        run.step(step)
    before = {name: value.clone() for name, value in run.state().items()}
    run.stepper._graph.replay = lambda: None
    with pytest.raises(DeviceError, match=rf"at step {EPOCH}, after earlier ones did not"):
        run.step(EPOCH)
    assert_equal(run.state(), before)


def test_parameters_that_moved_are_checked_at_the_next_epoch(monkeypatch):
    checked, find_problem = [], module.find_problem

    def listed(*arguments):
        checked.append(step)
        return find_problem(*arguments)

    step = -1
    run = Run(build("dropout"), captured=True)
    monkeypatch.setattr(module, "find_problem", listed)
    for step in range(STEPS):
        if step == EPOCH + 2:
            weight = run.model[0].weight
            weight.data = weight.data.clone()
        run.step(step)
    assert checked == [EPOCH, 2 * EPOCH]
