"""Sums of what is logged beside the loss."""

import math

import torch
from torch import nn

from ddp_sgd.engine.logged_numbers import logged_names, sum_numbers, sum_of_means, times
from ddp_sgd.losses import Objective
from ddp_sgd.named_losses import LossForm

SCORES = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 2.0], [9.0, 0.0, 0.0]])
LABELS = torch.tensor([0, 1, 1, -100])
VALUES = {"loss": torch.tensor(1.0), "a": torch.tensor(2.0), "b": torch.tensor(math.nan)}
FORM = LossForm(("a", "b"), is_mapping=True)


def objective(**options):
    return Objective(nn.CrossEntropyLoss(), LABELS[:3], **options)


def test_names_and_the_accuracy():
    assert logged_names(objective()) == ()
    assert logged_names(objective(form=FORM, counts_correct=True)) == ("a", "b", "accuracy")


def test_numbers_are_summed_over_samples_and_correct_ones_over_labels():
    whole = objective(form=FORM, counts_correct=True)
    sums, units = sum_numbers(whole, VALUES, SCORES, LABELS, samples=4).tolist()
    assert (sums[0], sums[2]) == (8.0, 2.0)
    assert math.isnan(sums[1])
    assert units == [4.0, 4.0, 3.0]


def test_a_dummy_counts_for_nothing():
    whole = objective(form=FORM, counts_correct=True)
    numbers = sum_numbers(whole, VALUES, SCORES, LABELS, samples=0)
    assert numbers.tolist() == [[0.0] * 3, [0.0] * 3]


def test_numbers_have_units_of_their_own():
    units = {"a": torch.tensor(5.0).double(), "b": torch.tensor(0.0).double()}
    numbers = sum_numbers(objective(form=FORM), VALUES, SCORES, LABELS, samples=4, units=units)
    assert numbers.tolist() == [[10.0, 0.0], [5.0, 0.0]]


def test_what_has_no_units_is_zero():
    numbers = times(torch.tensor([math.nan, math.inf, 2.0]), torch.tensor([0.0, 0.0, 3.0]))
    assert numbers.tolist() == [0.0, 0.0, 6.0]


def test_a_sum_of_means_leaves_out_the_accuracy_and_what_had_no_units():
    assert sum_of_means({"a": 1.0, "b": None, "c": 2.0, "accuracy": 0.5}) == 3.0
    assert sum_of_means({"a": None, "accuracy": 0.5}) is None
