import math

import pytest
import torch
from torch import nn

from ddp_sgd.data.loader import MicroBatch, StepBatches
from ddp_sgd.distributed.data_parallel import DataParallelModel
from ddp_sgd.distributed.progress import ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine import units as module
from ddp_sgd.engine.step import Stepper
from ddp_sgd.losses import Objective
from ddp_sgd.optim.sgd import build_sgd

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
Y = torch.tensor([[1.0], [0.0], [2.0]])


def linear():
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[0.5, -0.5]])
    return model


def stepper(model, **options):
    optimizer = build_sgd(model, momentum=0.9)
    objective = Objective(nn.MSELoss(), Y)
    return Stepper(
        DataParallelModel(model, Runtime()),
        objective,
        optimizer,
        Runtime(),
        ProgressTracker(),
        **options,
    )


def batches(*sizes, x=X, y=Y):
    inputs, targets = x.split(sizes), y.split(sizes)
    parts = [
        MicroBatch(i, t, len(i), is_last=number == len(sizes) - 1)
        for number, (i, t) in enumerate(zip(inputs, targets, strict=True))
    ]
    return StepBatches(0, sum(sizes), tuple(parts))


@pytest.mark.parametrize("sizes", [(3,), (2, 1), (1, 1, 1)])
def test_a_step_on_the_mean_gradient(sizes):
    model = linear()
    error = X @ model.weight.detach().T - Y
    gradient = 2 * (error * X).mean(0)
    result = stepper(model).step(batches(*sizes), lr=0.1)
    torch.testing.assert_close(model.weight.detach()[0], torch.tensor([0.5, -0.5]) - 0.1 * gradient)
    total = sum(w * loss.item() for w, loss in zip(result.weights, result.losses, strict=True))
    assert total == pytest.approx((error**2).sum().item())
    assert result.grad_norm.item() == pytest.approx(gradient.norm().item())
    assert (result.units, result.local_units, result.weights) == (3, 3, list(sizes))


def test_units_that_are_counted_on_the_device_take_the_same_step(monkeypatch):
    weights = []
    for on_host in (True, False):
        monkeypatch.setattr(module, "counts_on_host", lambda _, on_host=on_host: on_host)
        model, labels = nn.Linear(2, 3), torch.tensor([0, 2, -100])
        nn.init.constant_(model.weight, 0.5)
        nn.init.zeros_(model.bias)
        take = stepper(model)
        loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
        take._objective = Objective(loss, labels)
        result = take.step(batches(2, 1, y=labels), lr=0.1)
        assert (float(result.units), float(result.local_units)) == (4.0, 4.0)
        assert isinstance(result.local_units, torch.Tensor) is not on_host
        assert len(result.tensors()) == (3 if on_host else 5)
        weights.append(model.weight.detach())
    assert torch.equal(*weights)


def test_clipping_shortens_the_gradient_and_reports_the_true_norm():
    model = linear()
    result = stepper(model, clip_norm=0.5).step(batches(3), lr=1.0)
    assert result.grad_norm > 0.5
    assert (model.weight.detach() - torch.tensor([[0.5, -0.5]])).norm().item() == pytest.approx(
        0.5, rel=1e-5
    )


def test_clipping_by_value_clamps_each_element_and_reports_the_norm_before():
    model = linear()
    gradient = 2 * ((X @ model.weight.detach().T - Y) * X).mean(0)
    assert gradient.abs().min() < 3.0 < gradient.abs().max()
    result = stepper(model, clip_value=3.0).step(batches(2, 1), lr=1.0)
    clamped = torch.tensor([0.5, -0.5]) - gradient.clamp(-3.0, 3.0)
    torch.testing.assert_close(model.weight.detach()[0], clamped)
    assert result.grad_norm.item() == pytest.approx(gradient.norm().item())


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("clipping", [{}, {"clip_norm": 1.0}, {"clip_value": 1.0}])
def test_a_step_without_a_finite_gradient_changes_nothing(poison, clipping):
    model = linear()
    take = stepper(model, **clipping)
    take.step(batches(3), lr=0.1)
    weight = model.weight.detach().clone()
    momentum_buffer = take._optimizer.momentum_buffers[model.weight].clone()
    bad = X.clone()
    bad[1, 0] = poison
    assert not take.step(batches(2, 1, x=bad), lr=0.1).grad_norm.isfinite()
    assert torch.equal(model.weight, weight)
    assert torch.equal(take._optimizer.momentum_buffers[model.weight], momentum_buffer)
    assert take.step(batches(3), lr=0.1).grad_norm.isfinite()
    assert model.weight.isfinite().all()
