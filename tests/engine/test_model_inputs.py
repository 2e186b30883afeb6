"""What a data set gives becomes the arguments of a model's forward."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from ddp_sgd.engine.components import choose_spread

X = torch.zeros(4, 2)


class One(nn.Module):
    def forward(self, x):
        return x


class Two(nn.Module):
    def forward(self, left, right):
        return left


class Optional(nn.Module):
    def forward(self, x, mask=None):
        return x


class Named(nn.Module):
    def forward(self, input_ids=None, attention_mask=None, *, labels=None):
        return input_ids


class Star(nn.Module):
    def forward(self, *parts):
        return parts


class Words(nn.Module):
    def forward(self, **words):
        return words


PAIR = [X, X]
IMAGES = [torch.zeros(3, 5, 5)] * 4  # one entry per sample, as detection models take


@pytest.mark.parametrize(
    ("model", "inputs", "spread"),
    [
        (One(), X, "whole"),
        (Two(), X, "whole"),
        (One(), PAIR, "whole"),
        (Two(), PAIR, "positions"),
        (Two(), (X, X), "positions"),
        (Two(), [X, X, X], "whole"),
        (Two(), ["a", "b"], "positions"),
        (Optional(), PAIR, "positions"),
        (Optional(), IMAGES, "whole"),
        (Optional(), IMAGES[:2], "whole"),
        (Star(), PAIR, "positions"),
        (Star(), IMAGES, "whole"),
        (One(), {"x": X}, "whole"),
        (Two(), {"left": X, "right": X}, "keywords"),
        (Two(), {"left": X, "wrong": X}, "whole"),
        (Optional(), {"x": X}, "keywords"),
        (Named(), OrderedDict(input_ids=X, labels=X), "keywords"),
        (Named(), {"tokens": X}, "whole"),
        (Words(), {"anything": X}, "keywords"),
        (torch.compile(Two(), backend="eager"), PAIR, "positions"),
        (nn.Linear(2, 2), X, "whole"),
    ],
)
def test_inputs_are_spread_where_forward_takes_several(model, inputs, spread):
    assert choose_spread(model, inputs, samples=4) == spread
