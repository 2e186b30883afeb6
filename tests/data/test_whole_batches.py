"""Data sets with ``__getitems__``: used as it is meant, or refused before the first step."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from ddp_sgd.data import Digits
from ddp_sgd.data.dataset_checks import gives_whole_batches, may_give_whole_batches, require_rows
from ddp_sgd.data.fetcher import Fetcher, Request, Unreadable
from ddp_sgd.errors import DataError


class Singles:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((2,), float(index)), index


class Whole(Singles):
    """Gives for indices what a function makes of them."""

    def __init__(self, give):
        self.give = give

    def __getitems__(self, indices):
        return self.give(indices)


class Off(Singles):
    __getitems__ = None


class Own(Digits):
    def __getitem__(self, index):
        return super().__getitem__(index)


def stacked(indices):
    return torch.tensor(indices), np.array(indices)


def fetch(dataset, indices):
    return Fetcher(dataset, "data.train", 0).__getitems__(Request(0, np.array(indices)))


@pytest.mark.parametrize(
    ("dataset", "may"),
    [
        (Whole(stacked), True),
        (Subset(Whole(stacked), range(3)), True),
        (Digits(), True),
        (TensorDataset(torch.zeros(2), torch.zeros(2)), True),
        (TensorDataset(torch.zeros(2), torch.zeros(2), torch.zeros(2)), False),
        (Singles(), False),
        (Off(), False),
        (Own(), False),
        (Subset(Whole(stacked), []), False),
    ],
)
def test_who_may_give_whole_batches(dataset, may):
    assert may_give_whole_batches(dataset) is may


@pytest.mark.parametrize(
    ("give", "whole"),
    [
        (stacked, True),
        (lambda indices: list(stacked(indices)), True),
        (lambda indices: (torch.tensor(indices), ["text"] * len(indices)), True),
        (
            lambda indices: ({"a": torch.tensor(indices), "b": stacked(indices)}, stacked(indices)),
            1,
        ),
        (lambda indices: [(0, 0) for _ in indices], False),
        (lambda indices: tuple((0, 0) for _ in indices), False),
    ],
)
def test_a_pair_is_a_batch_and_a_list_holds_samples(give, whole):
    assert gives_whole_batches(Whole(give), "data.train") is bool(whole)


def fails(indices):
    raise ValueError("at least\ntwo")


def fails_alone(indices):
    return stacked(indices) if len(indices) > 1 else fails(indices)


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            fails_alone,
            "data.train.__getitems__ fails for the index 0, ValueError: at least two; let it serve "
            "any number of indices, since ranks also read single samples, or remove it, so that "
            "samples are read one by one.",
        ),
        (
            lambda indices: (torch.zeros(3), torch.zeros(1)),
            "data.train.__getitems__ gives inputs of 3 rows for the index 0; stack one row per "
            "index, in their order, or return a list of samples.",
        ),
        (
            lambda indices: (torch.zeros(1), {"a": torch.zeros(1), "b": np.zeros(4)}),
            "gives targets of 4 rows for",
        ),
        (lambda indices: (torch.zeros(1), Pair(torch.zeros(1), torch.zeros(()))), "without rows"),
        (lambda indices: (torch.zeros(1), 5), "gives targets without rows for the index 0"),
        (lambda indices: (torch.zeros(1), None), "gives targets without rows for the index 0"),
        (lambda indices: (torch.zeros(1), "a"), "gives targets without rows for the index 0"),
        (lambda indices: (torch.zeros(1), np.float32(1)), "gives targets without rows"),
        (lambda indices: ([torch.zeros(1)] * 2, torch.zeros(1)), "gives inputs of 2 rows"),
        (
            lambda indices: (*stacked(indices), 1),
            "data.train.__getitems__ gives a tuple of 3 for the index 0, not (inputs, targets); "
            "return a pair of stacked parts, or a list of samples.",
        ),
        (lambda indices: {"x": [1], "y": [2]}, "gives a mapping with x, y for the index 0, not"),
        (lambda indices: None, "gives None for the index 0, not"),
        (lambda indices: [], "gives a list of 0 for the index 0, not"),
        (iter, "gives a list_iterator for the index 0, not"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda dataset: dataset, lambda d: Subset(d, [0, 4, 6])])
def test_what_serves_no_single_sample_is_refused_by_the_first_read(wrap, give, message):
    fault = fetch(wrap(Whole(give)), [2, 1])
    assert isinstance(fault, Unreadable)
    assert message in fault.message
    assert "\n" not in fault.message
    single = Fetcher(wrap(Whole(give)), "data.train", 0).read_with_singles(Request(0, np.arange(2)))
    assert single == fault


def test_what_the_remedies_give_is_read():
    """Serve one index too; or remove the method; or return a list of samples."""
    for dataset in (
        Whole(stacked),
        Singles(),
        Whole(lambda indices: [Singles()[index] for index in indices]),
    ):
        assert fetch(dataset, [5, 3])[1].tolist() == [5, 3]


def test_a_user_error_passes_unchanged():
    def refuse(indices):
        raise DataError("x is y; do z.")

    assert fetch(Whole(refuse), [1]) == Unreadable("x is y; do z.")


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (
            lambda indices: stacked(indices if len(indices) < 3 else indices[:-1]),
            "data.train.__getitems__ gives inputs of 2 rows for 3 indices from 6 on; stack one row "
            "per index",
        ),
        (
            lambda indices: (torch.tensor(indices), torch.zeros(1)),
            "data.train.__getitems__ gives targets of 1 rows for 3 indices from 6 on",
        ),
        (
            lambda indices: stacked(indices) if len(indices) < 3 else fails(indices),
            "data.train.__getitems__ fails for 3 indices from 6 on, ValueError: at least two; let",
        ),
        (
            lambda indices: stacked(indices) if len(indices) < 3 else stacked(indices) * 2,
            "data.train.__getitems__ gives a tuple of 4 for 3 indices from 6 on, not",
        ),
    ],
)
def test_a_batch_that_falls_short_later_is_refused(give, message):
    fetcher = Fetcher(Whole(give), "data.train", 0)
    assert not isinstance(fetcher.__getitems__(Request(0, np.array([4]))), Unreadable)
    fault = fetcher.__getitems__(Request(0, np.array([6, 1, 3])))
    assert isinstance(fault, Unreadable)
    assert message in fault.message


def test_the_first_fault_of_several_parts_is_named():
    with pytest.raises(DataError, match=re.escape("gives inputs of 1 rows for 2 indices")):
        require_rows(({"a": torch.zeros(2), "b": torch.zeros(1)}, torch.zeros(3)), [4, 5], "d")
