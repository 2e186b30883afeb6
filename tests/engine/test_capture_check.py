"""What the check of a captured step compares; its refusals are in test_captured_step.py."""

import math

import pytest
import torch
from torch import nn

from ddp_sgd.engine.capture_check import Moved, _distance, find_problem

HOST = [torch.default_generator]
NAN = math.nan


@pytest.mark.parametrize(
    ("one", "other", "distance"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 1.5], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([NAN, 2.0], [NAN, 2.0], 0.0),
        ([1.0, 2.0], [NAN, 2.0], math.inf),
        ([math.inf], [math.inf], 0.0),
        ([1.0], [1.0, 2.0], math.inf),
    ],
)
def test_the_distance_of_two_tensors(one, other, distance):
    assert _distance(torch.tensor(one), torch.tensor(other)) == distance


def check(model, replayed, noise=0.0):
    """Take a step that adds 1, eagerly with some noise, or by a replay that adds another number."""
    takes = iter([1.0, 1.0 + noise])

    def add(number):
        model.weight.data.add_(number)
        return torch.tensor([0.0])

    moved = Moved([model], HOST, {})
    return find_problem(
        moved, lambda: None, lambda: add(next(takes)), lambda: None, lambda: add(replayed)
    )


@pytest.mark.parametrize(("noise", "allowed"), [(0.0, 0.0), (2.0**-10, 2.0**-9)])
def test_a_replay_may_differ_as_eager_steps_do(noise, allowed):
    model = nn.Linear(1, 1)
    model.weight.data.fill_(1.0)
    assert check(model, 1.0 + allowed, noise) == ""
    assert "parameter 0.weight differs by" in check(model, 1.0 + 8 * allowed + 2.0**-10, noise)
    assert model.weight.item() == 1.0


def test_steps_that_never_agree_cannot_be_compared():
    model = nn.Linear(1, 1)
    losses = iter([torch.tensor([1.0]), torch.tensor([math.inf])])
    problem = find_problem(
        Moved([model], HOST, {}),
        lambda: None,
        lambda: next(losses),
        lambda: None,
        lambda: torch.tensor([1.0]),
    )
    assert problem.startswith("gives tensors of other shapes, or other values that are not finite")
