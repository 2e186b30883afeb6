"""Promise 1 for any memory layout: steps equal torch.optim.SGD's on the whole batch."""

from itertools import product

import pytest
import torch
from ranks import run_ranks
from torch import nn

from ddp_sgd.config import RunConfig
from ddp_sgd.data.loader import MicroBatch, StepBatches
from ddp_sgd.distributed.data_parallel import wrap_model
from ddp_sgd.distributed.progress import ProgressTracker
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.engine.step import Stepper
from ddp_sgd.losses import Objective
from ddp_sgd.optim.sgd import build_sgd
from ddp_sgd.plan import make_plan, micro_batch_sizes

SAMPLES, STEPS, RATE = 13, 3, 0.05
INPUTS = torch.Generator().manual_seed(0)
X = torch.randn(SAMPLES, 2, 3, 4, 4, generator=INPUTS, dtype=torch.float64)
Y = torch.randn(SAMPLES, 3, generator=INPUTS, dtype=torch.float64)

# Sums of some hundred terms in another order differ by about ten units, here relative to the
# largest weight: 1e-6 is 8 units of float32, 1e-12 far more of float64.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


class Net(nn.Module):
    """Weights of five, four, two, one and no dimensions; some gradients have many zeros."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.volume = nn.Conv3d(2, 4, 3, padding=(0, 1, 1))
        self.image = nn.Conv2d(4, 6, (2, 3))
        self.line = nn.Linear(36, 3)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.replaces_storage = False
        self.to(dtype)

    def forward(self, x):
        if self.replaces_storage:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()
        x = torch.tanh(self.volume(x).squeeze(2))
        return self.scale * self.line(torch.tanh(self.image(x)).flatten(1))


def permuted(tensor, order):
    """The same numbers, laid out in another order of dimensions."""
    back = [order.index(dim) for dim in range(tensor.ndim)]
    return tensor.permute(order).contiguous().permute(back)


LAYOUTS = {
    "contiguous": lambda p: p,
    "channels_last": lambda p: (
        p.contiguous(memory_format=torch.channels_last) if p.ndim == 4 else p
    ),
    "channels_last_3d": lambda p: (
        p.contiguous(memory_format=torch.channels_last_3d) if p.ndim == 5 else p
    ),
    "transposed": lambda p: permuted(p, [1, 0, *range(2, p.ndim)]) if p.ndim > 1 else p,
    "permuted": lambda p: permuted(p, [*range(1, p.ndim), 0]) if p.ndim > 1 else p,
}

OPTIONS = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov, decay": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "clipping, decay": {"momentum": 0.5, "weight_decay": 0.1, "clip_norm": 0.05},
}

CASES = list(product(LAYOUTS, TOLERANCE, OPTIONS, (False, True)))


def flat(model):
    return torch.cat([p.detach().double().reshape(-1) for p in model.parameters()]).numpy()


def by_torch(dtype, options):
    """The whole batch, one process, contiguous weights."""
    options = dict(options)
    clip = options.pop("clip_norm", None)
    model = Net(dtype)
    decay = options.pop("weight_decay", 0.0)
    wide = [p for p in model.parameters() if p.ndim > 1]
    narrow = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": wide, "weight_decay": decay}, {"params": narrow, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=RATE, **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(X.to(dtype)), Y.to(dtype)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return flat(model)


def batches(runtime, step, dtype):
    """This rank's part: every W-th sample, in micro-batches of at most three."""
    x, y = (part[runtime.rank :: runtime.world_size].to(dtype) for part in (X, Y))
    sizes = micro_batch_sizes(SAMPLES, runtime.rank, runtime.world_size, 3)
    parts = zip(x.split(sizes), y.split(sizes), strict=True)
    micro = [MicroBatch(a, b, len(a), is_last=False) for a, b in parts]
    micro[-1] = micro[-1]._replace(is_last=True)
    return StepBatches(step, SAMPLES, tuple(micro))


def by_us(runtime, kind, layout, dtype, options, replaces_storage):
    options = dict(options)
    clip = options.pop("clip_norm", None)
    model = Net(dtype)
    for parameter in model.parameters():
        parameter.data = LAYOUTS[layout](parameter.data)
    model.replaces_storage = replaces_storage
    config = RunConfig(parallel={"replica": kind}, data={"batch_size": 3})
    plan = make_plan(config, samples=SAMPLES, world_size=runtime.world_size)
    optimizer = build_sgd(model, **options)
    wrapper = wrap_model(model, runtime, config.parallel, plan, optimizer.momentum_buffers)
    objective = Objective(nn.MSELoss(), Y)
    stepper = Stepper(wrapper, objective, optimizer, runtime, ProgressTracker(), clip_norm=clip)
    for step in range(STEPS):
        stepper.step(batches(runtime, step, dtype), RATE)
    for parameter in model.parameters():
        assert parameter.stride() == LAYOUTS[layout](torch.empty_like(parameter)).stride()
    return flat(model), weights_digest(model)


def every_case(runtime, kind):
    return {
        case: by_us(runtime, kind, case[0], case[1], OPTIONS[case[2]], case[3]) for case in CASES
    }


@pytest.fixture(scope="module")
def expected():
    return {(d, name): by_torch(d, options) for d in TOLERANCE for name, options in OPTIONS.items()}


@pytest.mark.parametrize(("kind", "world_size"), [("flat", 1), ("flat", 3), ("ddp", 2)])
def test_steps_equal_those_of_torch_in_any_layout(kind, world_size, expected):
    first, *others = run_ranks(world_size, every_case, kind)
    for (layout, dtype, options, replaces), (weights, digest) in first.items():
        right = expected[dtype, options]
        distance = abs(weights - right).max() / abs(right).max()
        assert distance <= TOLERANCE[dtype], (layout, dtype, options, replaces)
        start = flat(Net(dtype))
        assert abs(weights - start).max() > 1e-3  # it moved at all
        case = (layout, dtype, options, replaces)
        assert [other[case][1] for other in others] == [digest] * len(others), case


def narrow_types(runtime, kind, dtype, layout):
    """One rank with micro-batches, and torch with the same ones: the same bits."""
    model, plain = Net(torch.float32).to(dtype), Net(torch.float32).to(dtype)
    for parameter in model.parameters():
        parameter.data = LAYOUTS[layout](parameter.data)
    config = RunConfig(parallel={"replica": kind}, data={"batch_size": 3})
    plan = make_plan(config, samples=SAMPLES, world_size=1)
    optimizer = build_sgd(model, momentum=0.9)
    wrapper = wrap_model(model, runtime, config.parallel, plan, optimizer.momentum_buffers)
    stepper = Stepper(wrapper, Objective(nn.MSELoss(), Y), optimizer, runtime, ProgressTracker())
    torchs = torch.optim.SGD(plain.parameters(), lr=RATE, momentum=0.9, fused=True)
    for step in range(STEPS):
        parts = batches(runtime, step, dtype)
        stepper.step(parts, RATE)
        torchs.zero_grad()
        for part in parts.micro_batches:
            loss = nn.functional.mse_loss(plain(part.inputs), part.targets)
            (loss * (part.samples / SAMPLES)).backward()
        torchs.step()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return max((a - b).detach().abs().max().item() for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_take_torch_s_steps(dtype):
    """Contiguous, to the bit; else kernels may add up in another order, by a unit of the type."""
    (same,) = run_ranks(1, narrow_types, "flat", dtype, "contiguous")
    (other,) = run_ranks(1, narrow_types, "flat", dtype, "permuted")
    assert same == 0
    assert other <= 2 * STEPS * torch.finfo(dtype).eps


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(6, 5, dtype=torch.complex128)
        self.weight = nn.Parameter(permuted(weight, [1, 0]))
        self.bias = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x):
        return (x.to(self.weight.dtype) @ self.weight).abs() + self.bias


def complex_steps(runtime, kind):
    model, plain = Complex(), Complex()
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (6, 5))
    config = RunConfig(parallel={"replica": kind}, data={"batch_size": 8 // runtime.world_size})
    plan = make_plan(config, samples=8, world_size=runtime.world_size)
    optimizer = build_sgd(model, momentum=0.9, weight_decay=0.1, decay_norm_and_bias=True)
    wrapper = wrap_model(model, runtime, config.parallel, plan, optimizer.momentum_buffers)
    stepper = Stepper(
        wrapper, Objective(nn.MSELoss(), y), optimizer, runtime, ProgressTracker(), clip_norm=1.0
    )
    torchs = torch.optim.SGD(plain.parameters(), lr=RATE, momentum=0.9, weight_decay=0.1)
    mine = slice(runtime.rank, None, runtime.world_size)
    for step in range(STEPS):
        part = MicroBatch(x[mine], y[mine], len(x[mine]), is_last=True)
        stepper.step(StepBatches(step, 8, (part,)), RATE)
        torchs.zero_grad()
        nn.functional.mse_loss(plain(x), y).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        torchs.step()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    return max((a - b).detach().abs().max().item() for a, b in pairs)


@pytest.mark.parametrize(("kind", "world_size"), [("flat", 1), ("flat", 2), ("ddp", 2)])
def test_complex_weights_move_as_pairs_of_numbers(kind, world_size):
    assert max(run_ranks(world_size, complex_steps, kind)) <= 1e-12
