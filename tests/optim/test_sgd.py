"""SGD against a replay of its formula in plain Python."""

import pytest
import torch
from torch import nn

from ddp_sgd.errors import ConfigError
from ddp_sgd.models import ConvNet
from ddp_sgd.optim.sgd import build_sgd, set_lr


class One(nn.Module):
    """One weight of shape (1, 1), so that it decays, in float64."""

    def __init__(self, value=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[value]], dtype=torch.float64))


def steps(model, optimizer, gradients, rates):
    path = []
    for gradient, rate in zip(gradients, rates, strict=True):
        set_lr(optimizer, rate)
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        path.append(model.weight.item())
    return path


def test_two_steps_by_hand():
    """Gradient 1, momentum 0.9: v = 1, p = -0.1; then v = 1.9, p = -0.1 - 0.2 * 1.9 = -0.48."""
    model = One()
    path = steps(model, build_sgd(model, lr=0.1, momentum=0.9), [1.0, 1.0], [0.1, 0.2])
    assert path == pytest.approx([-0.1, -0.48], abs=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_twenty_steps_against_the_formula(momentum, nesterov, decay):
    if nesterov and not momentum:
        nesterov = False
    model = One(0.7)
    optimizer = build_sgd(model, lr=1.0, momentum=momentum, nesterov=nesterov, weight_decay=decay)
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


def test_who_decays():
    model = ConvNet(widths=[4, 4], batch_norm=True)
    optimizer = build_sgd(model, lr=0.1, weight_decay=0.5)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.5, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    everybody = build_sgd(model, lr=0.1, weight_decay=0.5, decay_norm_and_bias=True)
    assert [group["weight_decay"] for group in everybody.param_groups] == [0.5]


def test_a_step_is_skipped_where_found_inf_says_so_even_the_first():
    model = One(0.7)
    optimizer = build_sgd(model, lr=0.1, momentum=0.9)
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[0.0]]  # at rest
    optimizer.found_inf = torch.ones(())
    assert steps(model, optimizer, [float("nan")], [0.1]) == [0.7]
    optimizer.found_inf = torch.zeros(())
    assert steps(model, optimizer, [1.0, 1.0], [0.1, 0.2]) == pytest.approx([0.6, 0.22], abs=1e-15)


def test_the_first_step_from_rest_is_torch_s_own():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(5, 5), nn.Linear(5, 5)
    theirs.load_state_dict(ours.state_dict())
    mine = build_sgd(ours, lr=0.1, momentum=0.9)
    other = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, fused=True)
    for _ in range(3):
        inputs = torch.randn(4, 5)
        for model, optimizer in ((ours, mine), (theirs, other)):
            optimizer.zero_grad()
            (model(inputs) ** 2).sum().backward()
            optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_frozen_parameters_stay_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (decayed, spared) = build_sgd(model, lr=0.1).param_groups
    assert len(decayed["params"]) == len(spared["params"]) == 1
    model.requires_grad_(False)
    with pytest.raises(
        ConfigError, match="model is Sequential without a parameter to train; name a module"
    ):
        build_sgd(model, lr=0.1)
