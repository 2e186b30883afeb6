"""Three ways to keep a model equal, one result."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_sgd.distributed.data_parallel import DataParallelModel, FlatAllReduce, WrappedDDP
from ddp_sgd.distributed.runtime import Runtime


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def gradients(wrapper):
    return torch.cat([p.grad.flatten() for p in wrapper.inner.parameters()])


@pytest.mark.parametrize("kind", [DataParallelModel, FlatAllReduce])
def test_alone_the_model_is_not_wrapped(kind):
    inner = model()
    wrapper = kind(inner, Runtime())
    assert wrapper.forward is wrapper.inner is inner
    assert wrapper.divisor == 1
    assert not wrapper.averages_after(0)
    with wrapper.sync_gradients(when=False):
        wrapper.forward(torch.ones(2, 3)).sum().backward()
    own = gradients(wrapper)
    parts = wrapper.reduce(0)
    assert torch.equal(torch.cat([part.flatten() for part in parts]), own)
    assert torch.equal(gradients(wrapper), own)
    wrapper.sync_buffers()


def test_alone_a_parameter_may_go_without_a_gradient():
    wrapper = FlatAllReduce(model(), Runtime())
    wrapper.forward(torch.ones(2, 3)).sum().backward()
    wrapper.inner[2].bias.grad = None
    assert len(wrapper.reduce(0)) == 5


def work(runtime, kind, options):
    """The sum over ranks of gradients of two passes."""
    wrapper = kind(model(seed=runtime.rank), runtime, **options)
    weights = torch.cat([p.detach().flatten() for p in wrapper.inner.parameters()])
    inputs = torch.arange(12.0).reshape(4, 3) * (1 + runtime.rank)
    with wrapper.sync_gradients(when=False):
        (wrapper.forward(inputs) ** 2).sum().backward()
    apart = gradients(wrapper).clone()
    with wrapper.sync_gradients(when=True):
        (wrapper.forward(inputs) ** 2).sum().mul(wrapper.divisor).backward()
    parts = wrapper.reduce(0)
    whole = torch.cat([part.flatten() for part in parts])
    together = gradients(wrapper)
    before = wrapper.inner[1].running_mean.tolist()
    wrapper.sync_buffers()
    return {
        "weights": weights.tolist(),
        "apart": apart.tolist(),
        "together": together.tolist(),
        "whole": sorted(whole.tolist()) == sorted(together.tolist()),
        "parts": len(parts),
        "before": before,
        "after": [b.tolist() for b in wrapper.inner.buffers()],
        "wrapped": isinstance(wrapper.forward, DistributedDataParallel),
    }


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FlatAllReduce, {}),
        (WrappedDDP, {}),
        (WrappedDDP, {"bucket_cap_mb": 1e-5}),
        (WrappedDDP, {"gradient_as_bucket_view": False}),
        (WrappedDDP, {"find_unused_parameters": True}),
    ],
)
def test_ranks_share_weights_gradients_and_in_the_end_buffers(kind, options):
    first, second = run_ranks(2, work, kind, options)
    assert first["wrapped"] == (kind is WrappedDDP)
    assert first["parts"] == (1 if kind is FlatAllReduce else 6)
    assert first["whole"]
    assert first["weights"] == second["weights"]  # rank 0's
    assert first["apart"] != second["apart"]  # not reduced yet
    assert first["together"] == second["together"]  # reduced, equal to the last bit
    assert first["before"] != second["before"]  # each its own running statistics
    assert first["after"] == second["after"]
    assert first["after"][0] == first["before"]  # rank 0's


def mixed(runtime):
    """Parameters of two types, one of them not contiguous, one frozen."""
    inner = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2).double(), nn.Linear(2, 2))
    inner[0].weight.data = torch.arange(12.0).reshape(3, 4).t()
    inner[2].requires_grad_(False)
    wrapper = FlatAllReduce(inner, runtime)
    loss = inner[1](inner[0](torch.full((1, 3), 1.0 + runtime.rank)).double()).sum()
    loss.backward()
    own = [p.grad.numpy().copy() for p in inner.parameters() if p.requires_grad]
    parts = wrapper.reduce(0)
    reduced = [p.grad.numpy().copy() for p in inner.parameters() if p.requires_grad]
    return own, reduced, [str(p.dtype) for p in parts]


def test_a_buffer_for_each_type():
    (own_0, sum_0, types), (own_1, sum_1, _) = run_ranks(2, mixed)
    assert types == ["torch.float32", "torch.float64"]
    for a, b, one, other in zip(own_0, own_1, sum_0, sum_1, strict=True):
        assert (one == other).all()
        assert (one == a + b).all()


def forget_one(runtime):
    wrapper = FlatAllReduce(model(), runtime)
    wrapper.forward(torch.ones(2, 3)).sum().backward()
    wrapper.inner[2].bias.grad = None
    wrapper.reduce(0)


def test_a_parameter_without_a_gradient_is_a_fault_of_the_configuration():
    for error in run_ranks(2, forget_one, raises=True):
        assert error.error in ("ConfigError", "RemoteError")
        assert "set parallel.find_unused_parameters=true" in error.text


def forward_alone(runtime):
    wrapper = WrappedDDP(model(), runtime)
    if runtime.rank == 0:  # a forward pass must not wait for the other ranks
        for _ in range(3):
            wrapper.inner.eval()(torch.ones(2, 3))
    return True


def test_the_inner_module_talks_to_nobody():
    assert run_ranks(2, forward_alone) == [True, True]
