"""Units of a step, and gradients of losses that give their units themselves."""

import math

import pytest
import torch
from torch import nn

from ddp_sgd.data.loader import MicroBatch, StepBatches
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.units import CutOutputs, Part, backward, count_units
from ddp_sgd.losses import Objective
from ddp_sgd.named_losses import LossForm

X = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
BY_NAME = LossForm(("a", "b"), is_mapping=True, adds_up=True, units_by_name=True)


def batches(*targets, samples=None):
    parts = tuple(
        MicroBatch(X[: len(each)], each, len(each) if samples is None else samples, is_last=True)
        for each in targets
    )
    return StepBatches(0, 7, parts)


class Counting:
    def __call__(self, outputs, targets):
        return {"a": outputs.mean(), "b": outputs.sum()}

    def units(self, targets):
        return {"a": (targets > 0).sum(), "b": 2}


def test_samples_are_known_without_a_look_at_targets():
    units = count_units(Objective(nn.MSELoss(), X), batches(X, X[:2]), Runtime())
    assert (units.local, units.total, units.given) == (5, 7, ())


def test_units_that_a_loss_gives_are_summed_by_name():
    objective = Objective(Counting(), None, form=BY_NAME)
    units = count_units(objective, batches(torch.tensor([1, -1]), torch.tensor([-2])), Runtime())
    assert [{n: u.item() for n, u in each.items()} for each in units.given] == [
        {"a": 1.0, "b": 2.0},
        {"a": 0.0, "b": 2.0},
    ]
    assert {name: total.item() for name, total in units.totals.items()} == {"a": 1.0, "b": 4.0}


def test_a_dummy_has_no_units_and_none_at_all_divides_by_one():
    objective = Objective(Counting(), None, form=BY_NAME)
    units = count_units(objective, batches(torch.tensor([1, 1]), samples=0), Runtime())
    assert {name: each.item() for name, each in units.given[0].items()} == {"a": 0.0, "b": 0.0}
    assert {name: total.item() for name, total in units.totals.items()} == {"a": 1.0, "b": 1.0}


def gradient_of(model, parts_of, *, cut):
    model.zero_grad()
    outputs = model(X)
    parts = CutOutputs({"scores": outputs, "none": None, "fixed": outputs.detach()})
    if cut:
        parts.backward(parts_of(parts.outputs["scores"]))
    else:
        for part in parts_of(outputs):
            backward(part.value, part.gradient, keep_graph=True)
    return model.weight.grad.clone()


def part(value, units, gradient=0.5):
    return Part(value, torch.tensor(gradient), torch.tensor(float(units)))


def test_outputs_that_are_cut_give_the_gradient_of_the_whole():
    model = nn.Linear(2, 2)

    def parts_of(scores):
        return [part(scores.square().mean(), 3), part(scores.sin().sum() + model.weight.norm(), 2)]

    expected = gradient_of(model, parts_of, cut=False)
    torch.testing.assert_close(gradient_of(model, parts_of, cut=True), expected)


@pytest.mark.parametrize("units", [0, math.nan])
def test_a_part_without_units_has_no_gradient_even_if_that_is_no_number(units):
    model = nn.Linear(2, 2)
    mask = torch.zeros(3, 2)

    def parts_of(scores):
        nothing = (scores * mask).sum() / mask.sum()
        assert nothing.isnan()
        return [part(nothing, units, 0.0), part(scores.square().mean(), 3)]

    gradient = gradient_of(model, parts_of, cut=True)
    expected = gradient_of(model, lambda scores: parts_of(scores)[1:], cut=False)
    if units == 0:
        assert torch.equal(gradient, expected)
    else:  # which no units are: the step is skipped
        assert gradient.isnan().any()
