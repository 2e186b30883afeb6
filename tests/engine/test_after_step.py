"""``model.after_step(step)``: once after each step that was not skipped, on all ranks."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from graphs import Again, StopAt, train_captured
from ranks import run_ranks
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig
from ddp_sgd.data.sampler import TrainSampler
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import captured_step, sanity_check
from ddp_sgd.engine import rates as rates_module
from ddp_sgd.engine.after_step import AfterStep, check_after_step
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.step import StepResult
from ddp_sgd.errors import ConfigError
from ddp_sgd.optim.schedule import build_schedule
from ddp_sgd.optim.sgd import RateTable
from ddp_sgd.plan import make_plan

SAMPLES = 44
INPUTS = torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1))
TARGETS = torch.arange(SAMPLES) % 4
SHARE = 0.2


class Taught(nn.Module):
    """A network whose outputs depend on its mean teacher, which follows it after each step."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 4)
        )
        self.teacher = deepcopy(self.student).requires_grad_(False)
        self.register_buffer("center", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, inputs):
        with torch.no_grad():
            self.teacher.eval()
            hint = self.teacher(inputs) - self.center
        return self.student(inputs) + 0.3 * hint

    @torch.no_grad()
    def after_step(self, step):
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for mine, its in pairs:
            mine.lerp_(its, SHARE)
        self.center.lerp_(self.teacher[-1].bias, SHARE)
        self.calls += 1
        self.last.fill_(step)


class Replacing(Taught):
    """The same, with a buffer and a frozen parameter that are replaced, not written."""

    def after_step(self, step):
        center, bias = self.center, self.teacher[-1].bias
        super().after_step(step)
        self.center = center.clone()
        bias.data = bias.clone()
        self.calls = self.calls.clone()


def describe(folder, *, accumulate=1, batch_size=8, **changes):
    basis = {
        "output_dir": str(folder),
        "epochs": 2,
        "data": {"eval": None, "batch_size": batch_size, "accumulate": accumulate},
        "optim": {"reference_batch": 8},
        "log": {"every_steps": 1},
        "wandb": {"mode": "disabled"},
    }
    return RunConfig.model_validate(basis | changes)


def state_of(model):
    """Give the state of a model in a form that ranks can send: torch would send a file."""
    return {name: value.double().numpy().copy() for name, value in model.state_dict().items()}


def train(runtime, folder, accumulate=1, batch_size=8, make=Taught, **changes):
    """Train in double precision; return the state of the model."""
    model = make().double()
    config = describe(folder, accumulate=accumulate, batch_size=batch_size, **changes)
    samples = TensorDataset(INPUTS.double(), TARGETS)
    fit(config, runtime, model=model, train_set=samples)
    return state_of(model)


def train_in_parts(runtime, folder, replica):
    return train(runtime, folder, 2, 2, parallel={"replica": replica})


def largest_difference(one, other):
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(Runtime(), tmp_path_factory.mktemp("whole"))


def test_a_mean_teacher_is_that_of_a_plain_loop(whole):
    """Six steps per epoch, of 8 samples, the last of 4."""
    assert (whole["calls"], int(whole["calls"])) == (12, 12)
    model, plain = Taught().double(), Taught().double()
    assert largest_difference(whole, state_of(model)) > 0.01
    weights = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, lr=0.05, momentum=0.9)
    plan = make_plan(describe("x"), samples=SAMPLES, world_size=1)
    schedule = build_schedule(describe("x").schedule, plan)
    step = 0
    for epoch in range(2):
        sampler = TrainSampler(
            SAMPLES, rank=0, world_size=1, global_batch=8, batch_size=8, seed=0, tail="exact"
        )
        sampler.set_epoch(epoch)
        for drawn in sampler:
            indices = torch.as_tensor(drawn.indices)
            optimizer.param_groups[0]["lr"] = 0.05 * schedule(step)
            optimizer.zero_grad()
            outputs = plain(INPUTS.double()[indices])
            nn.functional.cross_entropy(outputs, TARGETS[indices]).backward()
            optimizer.step()
            step += 1
            plain.after_step(step)
    assert largest_difference(whole, state_of(plain)) < 1e-12


@pytest.mark.parametrize("replica", ["flat", "ddp"])
def test_micro_batches_and_ranks_agree_to_rounding(replica, whole, tmp_path):
    assert largest_difference(whole, train(Runtime(), tmp_path / "a", 4, 2)) < 1e-12
    first, second = run_ranks(2, train_in_parts, tmp_path / "b", replica)
    assert largest_difference(first, second) == 0.0
    assert largest_difference(whole, first) < 1e-12


def train_normalized(runtime, folder):
    def make():
        return Taught(norm=True)

    return train(runtime, folder, 1, 4, make)


def test_a_teacher_that_normalizes_is_equal_on_all_ranks(tmp_path):
    first, second = run_ranks(2, train_normalized, tmp_path)
    assert largest_difference(first, second) == 0.0


def force_the_way_of_devices(patch):
    """Let it be called after each step, and undone where that was skipped, as on a GPU."""

    def check(*args):
        model, _, runtime, _ = args
        found = check_after_step(*args)
        return AfterStep(model, found.places, runtime, waits=False)

    patch.setattr(sanity_check, "check_after_step", check)


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("make", [Taught, Replacing])
def test_a_skipped_step_does_not_call_it(make, forced, tmp_path, monkeypatch):
    if forced:
        force_the_way_of_devices(monkeypatch)
    inputs = INPUTS.double().clone()
    inputs[7] = float("inf")  # in one step of each epoch
    model = make().double()
    fit(describe(tmp_path), Runtime(), model=model, train_set=TensorDataset(inputs, TARGETS))
    assert model.calls == 10
    assert all(np.isfinite(value).all() for value in state_of(model).values())


@pytest.mark.parametrize("make", [Taught, Replacing])
def test_both_ways_give_the_same_bits(make, whole, tmp_path, monkeypatch):
    force_the_way_of_devices(monkeypatch)
    assert largest_difference(whole, train(Runtime(), tmp_path, make=make)) == 0.0


class Renormalizing(nn.Linear):
    """Layer whose trained weights have unit length after each step."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(3, 4)
        self.register_buffer("calls", torch.zeros(()))

    def after_step(self, step):
        self.weight.div_(self.weight.norm(dim=1, keepdim=True))
        self.calls.fill_(step)


@pytest.mark.parametrize("forced", [False, True])
def test_trained_weights_may_be_changed_too(forced, tmp_path, monkeypatch):
    if forced:
        force_the_way_of_devices(monkeypatch)
    inputs = INPUTS.clone()
    model = Renormalizing()
    before = model.weight.detach().clone()
    config = describe(tmp_path, batch_size=SAMPLES, epochs=1)
    fit(config, Runtime(), model=model, train_set=TensorDataset(inputs * float("nan"), TARGETS))
    assert torch.equal(model.weight, before)
    assert model.calls == 0
    config = describe(tmp_path / "b", batch_size=SAMPLES, epochs=1)
    fit(config, Runtime(), model=model, train_set=TensorDataset(inputs, TARGETS))
    torch.testing.assert_close(model.weight.norm(dim=1), torch.ones(4))
    assert model.calls == 1


@pytest.mark.parametrize("make", [Taught, Replacing])
def test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not(make, tmp_path):
    def run(folder, stop=None):
        model = make()
        samples = TensorDataset(INPUTS, TARGETS)
        return model, fit(describe(folder), Runtime(), model=model, train_set=samples, stop=stop)

    model, result = run(tmp_path / "whole")
    _, stopped = run(tmp_path / "cut", StopAt(2))
    assert (stopped.status, stopped.step) == ("stopped", 3)
    resumed_model, resumed = run(tmp_path / "cut")
    assert resumed.weights_digest == result.weights_digest
    assert model.last == resumed_model.last == 12
    assert model.calls == resumed_model.calls == 12


class Remembering(Taught):
    """Adds up in a buffer that no state dict holds, and that only ``after_step`` changes."""

    def after_step(self, step):
        super().after_step(step)
        self.last.add_(step)
        self.center.add_(self.last)


def test_buffers_that_are_not_persistent_are_saved_as_well(tmp_path):
    digests = set()
    for stops in ([], [StopAt(2)]):
        folder = tmp_path / str(len(stops))
        for stop in (*stops, None):
            samples = TensorDataset(INPUTS, TARGETS)
            result = fit(
                describe(folder), Runtime(), model=Remembering(), train_set=samples, stop=stop
            )
        digests.add(result.weights_digest)
    assert len(digests) == 1


@pytest.mark.parametrize("make", [Taught, Replacing])
@pytest.mark.parametrize("forced", [False, True])
def test_a_captured_run_has_the_bits_of_an_eager_one(make, forced, tmp_path, monkeypatch):
    monkeypatch.setattr(captured_step, "new_graph", lambda _: Again())

    def rate_table(context, schedule, _):
        rates = lambda step: context.plan.peak_lr * schedule(step)  # noqa: E731
        return RateTable(rates, context.plan.total_steps, torch.device("cpu"))

    monkeypatch.setattr(rates_module, "_rate_table", rate_table)
    if forced:
        force_the_way_of_devices(monkeypatch)
    states = []
    for captured in (False, True):
        model, samples = make(), TensorDataset(INPUTS, TARGETS)
        kept = [model.center, *model.teacher.parameters()]
        addresses = [tensor.data_ptr() for tensor in kept]
        folder = tmp_path / str(captured)
        data = {"batch_size": 8}
        train_captured(folder, Runtime(), model, samples, captured=captured, data=data)
        states.append(state_of(model))
    assert largest_difference(*states) == 0.0
    now = [model.center, *model.teacher.parameters()]
    assert [tensor.data_ptr() for tensor in now] == addresses  # from which a graph would read


class Resizing(Taught):
    def after_step(self, step):
        if step > 2:
            self.center = torch.zeros(1)


def test_a_captured_run_refuses_another_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(captured_step, "new_graph", lambda _: Again())
    monkeypatch.setattr(
        rates_module,
        "_rate_table",
        lambda context, schedule, _: RateTable(
            lambda step: context.plan.peak_lr * schedule(step),
            context.plan.total_steps,
            torch.device("cpu"),
        ),
    )
    samples = TensorDataset(INPUTS, TARGETS)
    with pytest.raises(ConfigError, match="after_step of Resizing gives center another shape"):
        train_captured(
            tmp_path, Runtime(), Resizing(), samples, captured=True, data={"batch_size": 8}
        )


class Wrong(Taught):
    def after_step(self):
        pass


class Counting(Taught):
    def after_step(self, step):
        self.count = step


class Registering(Taught):
    def after_step(self, step):
        self.register_buffer("made", torch.zeros(step))


class Failing(Taught):
    def after_step(self, step):
        if step == 1:
            raise KeyError("queue")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Wrong, r"model is Wrong, whose after_step\(1\) fails, TypeError: .*; let it take the num"),
        (Failing, r"model is Failing, whose after_step\(1\) fails, KeyError: 'queue'; "),
        (Counting, r"whose after_step sets Counting\.count, which no checkpoint holds; keep it in"),
        (Registering, r"model\.made is registered by after_step, so that its checkpoints fit no"),
    ],
)
def test_what_cannot_work_is_one_line_before_the_first_step(make, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        train(Runtime(), tmp_path, make=make)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "digits").glob("checkpoints/*.pt"))


def train_apart(runtime, folder):
    return train(runtime, folder, parallel={"local_sgd": {"start_step": 2}})


def test_ranks_that_differ_are_not_what_it_works_on(tmp_path):
    errors = run_ranks(2, train_apart, tmp_path, raises=True)
    assert any(
        "parallel.local_sgd.start_step is 2 while the model, Taught, has after_step" in str(error)
        for error in errors
    )


class Drawing(Taught):
    def after_step(self, step):
        self.center.normal_()


def train_drawing(runtime, folder):
    return train(runtime, folder, make=Drawing)


def test_random_numbers_are_refused_on_several_ranks(tmp_path):
    train(Runtime(), tmp_path / "alone", make=Drawing)
    errors = run_ranks(2, train_drawing, tmp_path / "two", raises=True)
    assert {error.error for error in errors} <= {"ConfigError", "RemoteError"}
    assert any("whose after_step draws random numbers" in str(error) for error in errors)


class FailingOnOne(Taught):
    rank = 0

    def after_step(self, step):
        super().after_step(step)
        if step == 3 and self.rank == 1:
            raise ValueError("a bad day")


def train_failing(runtime, folder):
    FailingOnOne.rank = runtime.rank
    return train(runtime, folder, make=FailingOnOne)


def test_a_failure_on_one_rank_is_one_line_and_ends_all_with_its_code(tmp_path):
    first, second = run_ranks(2, train_failing, tmp_path, raises=True)
    assert (first.error, second.error) == ("RemoteError", "ConfigError")
    line = "whose after_step(3) fails, ValueError: a bad day"
    assert line in second.text
    assert line in first.text


def test_the_model_is_left_alone_before_the_first_step():
    model = Taught()
    before = state_of(model)
    found = check_after_step(nn.Linear(3, 4), None, Runtime(), ())
    assert found is None
    result = StepResult([], [], 1, 1, torch.tensor(float("nan")))
    AfterStep(model, [], Runtime())(1, result)
    assert largest_difference(before, state_of(model)) == 0.0
