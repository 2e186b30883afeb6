import math
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from ddp_sgd.data import Digits, InMemory
from ddp_sgd.engine.rank_consistency import Mark, describe_model, mark_samples

Pair = namedtuple("Pair", "left right")


class Of:
    """A data set of one sample."""

    def __init__(self, *sample):
        self.sample = sample

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return self.sample


def marks_of(*sample):
    return mark_samples(Of(*sample), "data.train", seed=0)


def test_the_ends_and_the_middle_are_read():
    marks = mark_samples(Digits(), "data.train", seed=0)
    n = len(Digits())
    assert list(marks) == [
        f"the {what} of data.train[{index}]"
        for index in (0, n // 2, n - 1)
        for what in ("shape", "input", "target")
    ]
    assert marks["the shape of data.train[0]"].text == (
        "float32 of shape (1, 64), int64 of shape (1,)"
    )
    assert marks == mark_samples(Digits(), "data.train", seed=0)


def test_samples_of_any_form_are_marked_as_their_collate_function_gives_them():
    sample = {"ids": [1, 2], "label": 3}
    as_pair = lambda samples: (samples[0]["ids"], torch.tensor(samples[0]["label"]))  # noqa: E731
    marks = mark_samples([sample], "data.train", seed=0, collate=as_pair)
    assert marks["the target of data.train[0]"].text == "3"
    assert mark_samples([sample], "data.train", seed=0) == {}


@pytest.mark.parametrize("length", [1, 2])
def test_short_data_sets(length):
    data = InMemory(torch.zeros(length, 2), torch.zeros(length))
    assert len(mark_samples(data, "d", seed=0)) == 3 * length


def test_other_data_have_other_marks():
    target = marks_of(torch.zeros(3), 1)["the target of data.train[0]"]
    assert target.text == "1"
    assert not target.agrees_with(marks_of(torch.zeros(3), 2)["the target of data.train[0]"])


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [
        (Mark("a"), Mark("a"), True),
        (Mark("a"), Mark("b"), False),
        (Mark("x", 1.0, 2.0), Mark("y", 1.019, 2.0), True),
        (Mark("x", 1.0, 2.0), Mark("y", 1.021, 2.0), False),
        (Mark("x", 0.0, 2.0), Mark("y", 0.0, 2.1), False),
        (Mark("x", 0.0, 0.0), Mark("y", 0.1, 0.1), False),
        (Mark("nan", math.nan, math.nan), Mark("nan", math.nan, math.nan), True),
        (Mark("nan", math.nan, math.nan), Mark("x", 1.0, 1.0), False),
        (Mark("a"), Mark("x", 1.0, 1.0), False),
    ],
)
def test_agreement_of_marks(one, other, agree):
    assert one.agrees_with(other) is agree
    assert other.agrees_with(one) is agree


def test_whole_numbers_are_compared_as_they_are_and_pictures_by_their_mean():
    tokens = marks_of(torch.tensor([3, 1, 2]), torch.tensor([1, 0], dtype=torch.uint8))
    other = marks_of(torch.tensor([1, 2, 3]), torch.tensor([0, 1], dtype=torch.uint8))
    for name in ("the input of data.train[0]", "the target of data.train[0]"):
        assert tokens[name].mean is None
        assert tokens[name].text.startswith(f"{3 - ('target' in name)} numbers with the digest ")
        assert not tokens[name].agrees_with(other[name])
    picture = torch.full((2, 2), 100, dtype=torch.uint8)
    dim = picture.clone()
    dim[0, 0] = 99
    one, close = (marks_of(each, 0)["the input of data.train[0]"] for each in (picture, dim))
    assert one.mean == 100.0
    assert one.text != close.text
    assert one.agrees_with(close)


@pytest.mark.parametrize(
    "sample",
    [
        ({"a": torch.zeros(2), "b": [np.ones(3), (1, 2.0)]}, {"c": {"d": True}}),
        (OrderedDict(x=torch.zeros(1)), Pair(torch.zeros(2), 3)),
        (torch.zeros(0), torch.zeros(2, 0).long()),
        (torch.zeros(2, dtype=torch.complex64), 1j),
        (torch.zeros(3).to_sparse(), 1),
        (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bool)),
        ([torch.zeros(1)] * 2000, 1),
        ("text", 1),
        ({"of": {"many": [{"levels": [[[torch.zeros(1)]]]}]}}, None),
    ],
)
def test_containers_and_numbers_of_any_kind(sample):
    marks = marks_of(*sample)
    assert all(len(mark.text) < 300 for mark in marks.values())
    assert len(marks) < 40
    assert marks == marks_of(*sample)


def test_long_shapes_are_told_apart_by_a_digest():
    one, other = (
        marks_of([torch.zeros(1)] * 50 + [torch.zeros(last)], 1)["the shape of data.train[0]"].text
        for last in (1, 2)
    )
    assert one[:160] == other[:160]
    assert one != other


class Broken(Of):
    def __getitem__(self, index):
        raise OSError("gone")


def test_a_sample_that_cannot_be_read_has_no_mark():
    assert mark_samples(Broken(), "d", seed=0) == {}


def test_models_are_described_in_their_order():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    assert list(describe_model(model).items()) == [
        ("parameter 0.weight", "float32 of shape (2, 3)"),
        ("parameter 0.bias", "float32 of shape (2,), frozen"),
        ("parameter 1.weight", "float32 of shape (2,)"),
        ("parameter 1.bias", "float32 of shape (2,)"),
        ("buffer 1.running_mean", "float32 of shape (2,)"),
        ("buffer 1.running_var", "float32 of shape (2,)"),
        ("buffer 1.num_batches_tracked", "int64 of shape ()"),
    ]
    assert describe_model(nn.LazyLinear(2))["parameter weight"] == "float32 of shape unknown"
