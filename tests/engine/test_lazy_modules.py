"""Lazy modules get their shapes, and nothing else changes."""

import pytest
import torch
from torch import nn

from ddp_sgd.engine.components import is_materialized, materialize
from ddp_sgd.errors import ConfigError


def call(model, inputs):
    return model(inputs)


def network():
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Dropout(), nn.Flatten(), nn.LazyLinear(2)
    )


X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_shapes_and_weights_follow_from_data_and_seed():
    first, second, other = network(), network(), network()
    assert not is_materialized(first)
    for model, seed in ((first, 5), (second, 5), (other, 6)):
        before = torch.get_rng_state()
        materialize(model, X, call, seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert is_materialized(model)
        assert all(module.training for module in model.modules())
        assert model[1].num_batches_tracked == 0
    assert first[0].weight.shape == (4, 1, 3, 3)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert isinstance(first[4], nn.Linear)


class OnlyInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.aux = nn.LazyLinear(2), nn.LazyLinear(2)

    def forward(self, x):
        return (self.main(x), self.aux(x)) if self.training else self.main(x)


def test_a_layer_that_evaluation_leaves_out():
    with pytest.raises(ConfigError, match=r"model.aux.weight is not initialized by a forward pass"):
        materialize(OnlyInTraining(), X.flatten(1), call, 0)


def test_a_model_without_lazy_modules():
    assert is_materialized(nn.Linear(2, 2))
