"""SGD against a replay of its formula in plain Python."""

import pytest
import torch
from torch import nn

from ddp_sgd.errors import ConfigError
from ddp_sgd.models import ConvNet
from ddp_sgd.optim.sgd import SGD, RateTable, build_sgd, is_norm_or_bias


class One(nn.Module):
    """One weight of shape (1, 1), so that it decays, in float64."""

    def __init__(self, value=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[value]], dtype=torch.float64))


def steps(model, optimizer, gradients, rates, skipped=None):
    path = []
    for gradient, rate in zip(gradients, rates, strict=True):
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step(rate, skipped)
        path.append(model.weight.item())
    return path


def test_two_steps_by_hand():
    """Gradient 1, momentum 0.9: v = 1, p = -0.1; then v = 1.9, p = -0.1 - 0.2 * 1.9 = -0.48."""
    model = One()
    path = steps(model, build_sgd(model, momentum=0.9), [1.0, 1.0], [0.1, 0.2])
    assert path == pytest.approx([-0.1, -0.48], abs=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_twenty_steps_against_the_formula(momentum, nesterov, decay):
    if nesterov and not momentum:
        nesterov = False
    model = One(0.7)
    optimizer = build_sgd(model, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    gradients = [(-1) ** k * (0.3 + 0.1 * k) for k in range(20)]
    rates = [0.1 / (1 + k) for k in range(20)]
    p, v, expected = 0.7, 0.0, []
    for gradient, rate in zip(gradients, rates, strict=True):
        g = gradient + decay * p
        v = momentum * v + g
        p -= rate * (g + momentum * v if nesterov else v)
        expected.append(p)
    # 20 steps of a handful of float64 roundings each
    assert steps(model, optimizer, gradients, rates) == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_momentum_that_changes_between_steps_is_that_of_each_step(dtype, nesterov):
    """From 0 on, which is a momentum like any other."""
    momenta = [0.0, 0.0, 0.3, 0.6, 0.9, 0.9]
    gradients = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)
    model, start = nn.Linear(2, 3, bias=False, dtype=dtype), torch.ones(3, 2, dtype=dtype)
    model.weight.data.copy_(start)
    optimizer = build_sgd(model, momentum=0.9, nesterov=nesterov)
    p, v = start.double(), torch.zeros(3, 2, dtype=torch.float64)
    for momentum, gradient in zip(momenta, gradients, strict=True):
        optimizer.momentum = momentum
        model.weight.grad = gradient.clone()
        optimizer.step(0.1)
        v = momentum * v + gradient
        p = p - 0.1 * (gradient + momentum * v if nesterov else v)
    # 6 steps of a handful of roundings each
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    assert torch.allclose(model.weight.double(), p, rtol=tolerance, atol=tolerance)


def test_no_momentum_forgets_what_was_before_to_the_bit():
    model = One(0.7)
    optimizer = build_sgd(model, momentum=0.9)
    steps(model, optimizer, [1.0], [0.1])
    optimizer.momentum = 0.0
    before = model.weight.item()
    assert steps(model, optimizer, [0.5], [0.1]) == [before - 0.1 * 0.5]
    assert optimizer.momentum_buffers[model.weight].item() == 0.5


def test_who_decays():
    model = ConvNet(widths=[4, 4], batch_norm=True)
    decayed, spared = build_sgd(model, weight_decay=0.5).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    everybody = build_sgd(model, weight_decay=0.5, decay_norm_and_bias=True)
    assert [group["weight_decay"] for group in everybody.param_groups] == [0.5]
    (all_alike,) = build_sgd(model).param_groups  # one call of the kernel where nobody decays
    assert len(all_alike["params"]) == len(list(model.parameters()))


def test_a_step_is_skipped_where_it_is_said_so_even_the_first():
    model = One(0.7)
    optimizer = build_sgd(model, momentum=0.9)
    assert optimizer.momentum_buffers[model.weight].tolist() == [[0.0]]  # at rest
    assert steps(model, optimizer, [float("nan")], [0.1], torch.ones(())) == [0.7]
    path = steps(model, optimizer, [1.0, 1.0], [0.1, 0.2], torch.zeros(()))
    assert path == pytest.approx([0.6, 0.22], abs=1e-15)


def test_a_parameter_without_a_gradient_stays_where_it_is():
    """As in torch: neither decay nor the velocity moves it."""
    model = One(0.7)
    optimizer = build_sgd(model, momentum=0.9, weight_decay=0.1)
    steps(model, optimizer, [1.0], [0.1])
    where = model.weight.item()
    model.weight.grad = None
    optimizer.step(0.1)
    assert model.weight.item() == where


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_are_torch_s_own_to_the_bit(momentum, decay):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 5), nn.Linear(5, 5)
    theirs.load_state_dict(ours.state_dict())
    mine = build_sgd(ours, momentum=momentum, weight_decay=decay, decay_norm_and_bias=True)
    other = torch.optim.SGD(
        theirs.parameters(), lr=0.1, momentum=momentum, weight_decay=decay, fused=True
    )
    for _ in range(3):
        inputs = torch.randn(4, 5)
        for model, step in ((ours, lambda: mine.step(0.1)), (theirs, other.step)):
            model.zero_grad()
            (model(inputs) ** 2).sum().backward()
            step()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_frozen_parameters_stay_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = build_sgd(model).param_groups
    assert group["params"] == [model[1].weight, model[1].bias]
    model.requires_grad_(False)
    with pytest.raises(
        ConfigError, match="model is Sequential without a parameter to train; name a module"
    ):
        build_sgd(model)


def norm_or_bias(module):
    named = module.named_parameters(recurse=False)
    return {name for name, p in named if is_norm_or_bias(module, name, p)}


class T5LayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))


class NormalizedLinear(nn.Linear):
    """No normalization layer: its weight decays."""


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma, self.table = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(1, 3))


@pytest.mark.parametrize(
    ("module", "spared"),
    [
        (nn.LayerNorm((2, 3, 4)), {"weight", "bias"}),
        (nn.GroupNorm(1, 2), {"weight", "bias"}),
        (nn.RMSNorm((2, 3)), {"weight"}),
        (nn.BatchNorm2d(3), {"weight", "bias"}),
        (T5LayerNorm(), {"weight"}),
        (nn.Linear(2, 3), {"bias"}),
        (NormalizedLinear(2, 3), {"bias"}),
        (
            nn.MultiheadAttention(4, 2, add_bias_kv=True),
            {"in_proj_bias", "bias_k", "bias_v"},
        ),
        (nn.LSTM(2, 3), {"bias_ih_l0", "bias_hh_l0"}),
        (nn.Bilinear(2, 2, 2), {"bias"}),
        (Scaled(), {"gamma"}),
        (nn.Embedding(3, 2), set()),
    ],
)
def test_normalization_and_biases_are_reported_by_type_and_name(module, spared):
    assert norm_or_bias(module) == spared
    decaying = [
        group for group in build_sgd(module, weight_decay=0.1).param_groups if group["weight_decay"]
    ]
    decayed = {p for group in decaying for p in group["params"]}
    own = module.named_parameters(recurse=False)
    assert {name for name, p in own if p not in decayed} == spared


def replaced(tensor):
    return tensor.clone()


def turned(tensor):
    return tensor.t().contiguous().t()


@pytest.mark.parametrize("change", [replaced, turned])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_storage_and_layout_may_change_between_steps(change, momentum):
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 4), nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    mine = build_sgd(ours, momentum=momentum)
    other = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=momentum)
    for _ in range(3):
        ours.weight.data = change(ours.weight.data)
        inputs = torch.randn(4, 5)
        for model, step in ((ours, lambda: mine.step(0.1)), (theirs, other.step)):
            model.zero_grad()
            (model(inputs) ** 2).sum().backward()
            step()
    # Three steps of float32, a unit of 6e-8 for each product and sum.
    assert (ours.weight - theirs.weight).abs().max() <= 1e-6
    for parameter, momentum_buffer in mine.momentum_buffers.items():
        assert momentum_buffer.stride() == parameter.stride()


def test_a_gradient_of_another_layout_is_read_by_its_indices():
    model = nn.Linear(2, 3, bias=False)
    before, gradient = model.weight.detach().clone(), torch.arange(6.0).reshape(2, 3).t()
    model.weight.grad = gradient
    build_sgd(model).step(0.5)
    assert torch.equal(model.weight.detach(), before - 0.5 * gradient)


def test_its_state_dict_holds_momentum_by_name_in_the_order_of_the_model():
    torch.manual_seed(0)
    model, other = nn.Linear(2, 3), nn.Linear(2, 3)
    optimizer = build_sgd(model, momentum=0.9, weight_decay=0.1)
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step(0.1)
    saved = optimizer.state_dict()
    assert list(saved["momentum_buffer"]) == ["weight", "bias"]
    assert saved["momentum_buffer"]["bias"] is optimizer.momentum_buffers[model.bias]
    again = build_sgd(other, momentum=0.9)
    again.load_state_dict(saved)
    for name, parameter in other.named_parameters():
        assert torch.equal(again.momentum_buffers[parameter], saved["momentum_buffer"][name])
    again.load_state_dict({"momentum_buffer": {}})  # of a run without momentum
    assert again.momentum_buffers[other.bias].abs().sum() > 0


def test_without_names_its_parameters_are_numbered():
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))]
    optimizer = SGD([{"params": parameters, "weight_decay": 0.0}], momentum=0.5)
    assert list(optimizer.state_dict()["momentum_buffer"]) == ["0", "1"]


def test_a_rate_table_has_the_rate_of_each_step_whatever_the_block(monkeypatch):
    monkeypatch.setattr(RateTable, "SIZE", 4)
    table = RateTable(lambda step: 1.0 / (1 + step), 10, torch.device("cpu"))
    for step in [*range(10), 2, 7]:
        assert table.at(step).item() == torch.tensor(1.0 / (1 + step)).item()
        assert table.values[step % 4] == table.at(step)
