"""Compressed gradients: near the exact ones, equal on all ranks, and nothing is forgotten."""

import sys
from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from ddp_sgd.distributed.comm_hooks import _WHOLE_STEPS, build_comm_hook
from ddp_sgd.distributed.data_parallel import WrappedDDP
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ConfigError

SHAPES = [(40, 30), (30,), (24, 5, 6), (7, 3), (32, 40)]
UNIT = {"bf16": 2.0**-8, "fp16": 2.0**-11}
TINY = {"bf16": 0.0, "fp16": 2.0**-22}
"""Errors of one rounding: relative, and absolute below the smallest normal number."""


class Given(nn.Module):
    """A model whose gradient is what it is given."""

    def __init__(self, dtype):
        super().__init__()
        self.weights = nn.ParameterList([torch.zeros(shape, dtype=dtype) for shape in SHAPES])

    def forward(self, gradients):
        return sum((w * g).sum() for w, g in zip(self.weights, gradients, strict=True))


def wrapped(runtime, kind, bucket_mb=0.006, dtype=torch.float32):
    model = Given(dtype)
    hook = build_comm_hook(kind, model, runtime)
    return WrappedDDP(model, runtime, hook, bucket_cap_mb=bucket_mb)


def step(wrapper, gradients):
    """The reduced gradient, from one of each rank."""
    for weight in wrapper.inner.weights:
        weight.grad = None
    wrapper.forward(gradients).backward()
    return torch.cat([w.grad.flatten() for w in wrapper.inner.weights])


def gradients_of(rank, number, scale=1.0):
    generator = torch.Generator().manual_seed(1000 * number + rank)
    return [scale * torch.randn(shape, generator=generator) for shape in SHAPES]


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients]).double()


def mean_of(world_size, number, scale=1.0):
    return sum(flat(gradients_of(r, number, scale)) for r in range(world_size)) / world_size


def halves(runtime, kind):
    """Errors over their bounds, and the bits, at sizes from far below to above one."""
    wrapper, worst, bits = wrapped(runtime, kind), 0.0, []
    ranks = range(runtime.world_size)
    for number, scale in enumerate((1e-6, 1e-3, 1.0, 1e3)):
        reduced = step(wrapper, gradients_of(runtime.rank, number, scale))
        size = sum(flat(gradients_of(r, number, scale)).abs() for r in ranks) / len(ranks)
        # To 16 bits, divided, and added up, each with a rounding.
        bound = ((1 + UNIT[kind]) ** (len(ranks) + 1) - 1) * size + TINY[kind]
        error = (reduced.double() - mean_of(len(ranks), number, scale)).abs()
        worst = max(worst, (error / bound).max().item())
        bits.append(reduced.numpy().tobytes())
    overflown = step(wrapper, gradients_of(runtime.rank, 0, 1e38 if kind == "bf16" else 1e6))
    after = step(wrapper, gradients_of(runtime.rank, 0))
    return worst, bits, overflown.isfinite().all().item(), after.isfinite().all().item()


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_sixteen_bits_are_as_near_as_roundings_allow(kind):
    world_size = 3
    results = run_ranks(world_size, halves, kind)
    worst, bits, finite, finite_after = results[0]
    assert 0.1 < worst <= 1.0
    assert [other[1] for other in results[1:]] == [bits] * (world_size - 1)
    assert not finite or kind == "bf16"  # fp16 ends at 65,504: the step will be skipped
    assert finite_after


def factors(runtime):
    """Many steps of PowerSGD: bits, sums, and what is remembered in the end."""
    wrapper = wrapped(runtime, "powersgd")
    world_size, steps = runtime.world_size, _WHOLE_STEPS + 15
    whole, bits, total, exact = 0.0, [], 0.0, 0.0
    for number in range(steps):
        reduced = step(wrapper, gradients_of(runtime.rank, number))
        mean = mean_of(world_size, number)
        if number < _WHOLE_STEPS:
            whole = max(whole, (reduced - mean).abs().max().item())
        else:
            total, exact = total + reduced.double(), exact + mean
        bits.append(reduced.numpy().tobytes())
    memory = wrapper.state_dict()
    off = (reduced.double() - mean).norm() / mean.norm()
    held = None
    if memory:
        errors = [memory["errors"][f"weights.{n}"].double().mean(0) for n in range(len(SHAPES))]
        held = (exact - total - torch.cat(errors)).abs().max().item()
    return bits, whole, off.item(), held, bool(memory)


def test_what_powersgd_leaves_out_is_not_lost():
    """Reduced gradients and the mean error add up to the exact gradients.

    Numbers of about 10, errors included, are rounded a few times in each of 15 steps: 15 x 10 x
    6e-8 = 9e-6, times 4 for the sums of products of factors.
    """
    results = run_ranks(3, factors)
    bits, whole, off, held, remembers = results[0]
    assert whole < 1e-6  # at first nothing is left out
    assert off > 0.3  # then most is: these gradients are noise, which has no low rank
    assert held < 4e-5
    assert remembers
    for other in results[1:]:
        assert other[0] == bits
        assert not other[4]


def low_rank(runtime):
    """Largest error where the gradient, equal on all ranks, has rank 4, or is zero once."""
    wrapper = wrapped(runtime, "powersgd", dtype=torch.float64)
    generator, errors = torch.Generator().manual_seed(0), []
    for number in range(_WHOLE_STEPS + 5):
        gradients = []
        for shape in SHAPES:
            sides = shape[0], torch.Size(shape[1:]).numel()
            left, right = (torch.randn(n, 4, generator=generator).double() for n in sides)
            gradients.append((left @ right.t()).view(shape) * (number != _WHOLE_STEPS + 2))
        errors.append((step(wrapper, gradients) - flat(gradients)).abs().max().item())
    return max(errors)


def test_gradients_of_low_rank_are_exact():
    """Sums of 40 products of about 10, rounded to 1.1e-16, after a division by the angle between
    two random spaces of dimension 4, hardly ever below 1e-4: 4e-10.
    """
    assert max(run_ranks(2, low_rank)) < 4e-10


def poisoned(runtime, poison):
    """What is remembered before and after a gradient that is not finite, and the next gradient."""
    wrapper = wrapped(runtime, "powersgd")
    number = 0
    for number in range(_WHOLE_STEPS + 4):
        step(wrapper, gradients_of(runtime.rank, number))
    before = deepcopy(wrapper.state_dict())
    gradients = gradients_of(runtime.rank, number + 1)
    if runtime.rank == 1:
        gradients[0].view(-1)[0] = poison  # in the bucket that is reduced last
    bad = step(wrapper, gradients)
    after = wrapper.state_dict()
    equal = all(torch.equal(after["errors"][n], e) for n, e in before.get("errors", {}).items())
    equal &= all(torch.equal(after["factors"][n]["q"], f["q"])
                 for n, f in before.get("factors", {}).items())  # fmt: skip
    good = step(wrapper, gradients_of(runtime.rank, number + 2))
    return equal, bad.isfinite().all().item(), good.isfinite().all().item()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_step_that_is_skipped_leaves_no_trace(poison):
    assert run_ranks(2, poisoned, poison) == [(True, False, True)] * 2


def holding(runtime):
    """How often somebody else holds the group right after a bucket."""
    wrapper, group, held = wrapped(runtime, "powersgd"), dist.group.WORLD, 0
    hook = wrapper._hook._torchs_hook
    before = sys.getrefcount(group)

    def watched(state, bucket):
        nonlocal held
        done = hook(state, bucket)
        done.wait()
        held += sys.getrefcount(group) > before
        return done

    wrapper._hook._torchs_hook = watched
    for number in range(_WHOLE_STEPS + 100):
        step(wrapper, gradients_of(runtime.rank, number))
    return held


def test_no_thread_of_the_group_holds_it():
    """It would end the process if it were the last to let go."""
    assert run_ranks(2, holding) == [0, 0]


def remembering(runtime, file, bucket_mb):
    """What is remembered right after a start from a checkpoint, and the bits of a gradient."""
    wrapper = wrapped(runtime, "powersgd", bucket_mb)
    is_read = file is not None and runtime.rank == 0
    wrapper.load_state_dict(torch.load(file, weights_only=True) if is_read else None)
    found = wrapper.state_dict()
    reduced = step(wrapper, gradients_of(runtime.rank, 99))
    errors = {name: rows.numpy() for name, rows in found.get("errors", {}).items()}
    return errors, sorted(found.get("factors", {})), reduced.numpy().tobytes()


def save_memory(runtime, file):
    """Save what is remembered after some steps; gives the bits of the next gradient."""
    wrapper = wrapped(runtime, "powersgd")
    for number in range(_WHOLE_STEPS + 4):
        step(wrapper, gradients_of(runtime.rank, number))
    saved = wrapper.state_dict()
    if saved:
        torch.save(saved, file)
    return step(wrapper, gradients_of(runtime.rank, 99)).numpy().tobytes()


def test_memory_goes_to_any_ranks_and_buckets(tmp_path):
    file = tmp_path / "memory.pt"
    expected, _ = run_ranks(2, save_memory, file)
    saved = torch.load(file, weights_only=True)
    (same, names, reduced), _ = run_ranks(2, remembering, file, 0.006)
    assert reduced == expected
    assert names == sorted(saved["factors"])
    assert all((same[name] == rows.numpy()).all() for name, rows in saved["errors"].items())
    results = run_ranks(3, remembering, file, 0.006)
    for name, rows in saved["errors"].items():  # the mean error on each
        assert (results[0][0][name] == rows.mean(0).expand(3, -1).numpy()).all()
    assert {reduced for *_, reduced in results} == {results[0][2]}
    results = run_ranks(2, remembering, file, 25.0)
    assert results[0][1] == []  # other buckets: factors are drawn again in the first step
    assert all((results[0][0][name] == r.numpy()).all() for name, r in saved["errors"].items())
    assert results[0][2] == results[1][2]


def test_without_memory_it_begins_anew():
    results = run_ranks(2, remembering, None, 0.006)
    assert results[0][:2] == ({}, [])
    assert results[0][2] == results[1][2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex64])
def test_other_types_are_refused(dtype):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigError, match=f"the parameter 1.weight of the model is of {name}; set"):
        build_comm_hook("bf16", model, Runtime())
    model[1].requires_grad_(False)
    assert build_comm_hook("bf16", model, Runtime()) is not None
    assert build_comm_hook("none", model, Runtime()) is None
