"""Parts of samples by ``data.input`` and ``data.target``, whatever form the samples have."""

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from ddp_sgd.data import Arrays, InMemory
from ddp_sgd.data.device import move
from ddp_sgd.data.fetcher import Fetcher, Request, Unreadable
from ddp_sgd.data.placement import find_arrays
from ddp_sgd.data.read_ahead import InProcess
from ddp_sgd.data.selection import Selection

N = 12
COLUMNS = {
    "ids": torch.arange(2 * N).reshape(N, 2),
    "mask": torch.ones(N),
    "label": -torch.arange(N),
}
Row = namedtuple("Row", list(COLUMNS))
CPU = torch.device("cpu")


class Rows:
    """Samples of three columns, made by a function of a mapping of them."""

    def __init__(self, form=dict):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, index):
        return self.form({name: column[index] for name, column in COLUMNS.items()})


class ListOfRows(Rows):
    def __getitems__(self, indices):
        return [self[index] for index in indices]


class Whole(Rows):
    def __getitems__(self, indices):
        return self.form({name: column[indices] for name, column in COLUMNS.items()})


class WholeArrays(Rows):
    def __getitems__(self, indices):
        return self.form({name: column[indices].numpy() for name, column in COLUMNS.items()})


def in_order(row):
    return tuple(row.values())


def named(row):
    return Row(**row)


BY_NAME = {
    f"{kind.__name__} of {form.__name__}": kind(form)
    for kind in (Rows, ListOfRows, Whole, WholeArrays)
    for form in (dict, UserDict)
}
BY_POSITION = {
    "TensorDataset": TensorDataset(*COLUMNS.values()),
    **{
        f"{kind.__name__} of {name}": kind(form)
        for kind in (Rows, ListOfRows, Whole, WholeArrays)
        for name, form in {"tuples": in_order, "lists": lambda r: [*r.values()], "n": named}.items()
    },
}
NAMES = list(COLUMNS)


def fetch(dataset, selection, indices):
    request = Request(0, np.array(indices))
    batch = Fetcher(dataset, "data.train", 0, selection=selection).__getitems__(request)
    assert not isinstance(batch, Unreadable), batch
    return batch


def same(one, other):
    if isinstance(other, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in other)
    if isinstance(other, tuple):
        return type(one) is tuple and all(same(a, b) for a, b in zip(one, other, strict=True))
    return one is other if other is None else torch.equal(one, other)


@pytest.mark.parametrize("indices", [[5], [7, 0, 7]])
@pytest.mark.parametrize("name", BY_NAME)
def test_names_choose_parts_of_batches(name, indices):
    dataset = BY_NAME[name]
    ids, mask, label = (column[indices] for column in COLUMNS.values())
    assert same(fetch(dataset, Selection("ids", "label"), indices), (ids, label))
    assert same(fetch(dataset, Selection("mask"), indices), (mask, None))
    chosen = {"mask": mask, "ids": ids}
    assert same(fetch(dataset, Selection(["mask", "ids"]), indices), (chosen, None))
    assert same(fetch(dataset, Selection("ids", ["label"]), indices), (ids, {"label": label}))


@pytest.mark.parametrize("indices", [[5], [7, 0, 7]])
@pytest.mark.parametrize("name", BY_POSITION)
def test_positions_choose_parts_of_batches(name, indices):
    dataset = BY_POSITION[name]
    ids, mask, label = (column[indices] for column in COLUMNS.values())
    assert same(fetch(dataset, Selection(0, 2), indices), (ids, label))
    assert same(fetch(dataset, Selection(1), indices), (mask, None))
    assert same(fetch(dataset, Selection([1, 0]), indices), ((mask, ids), None))
    assert same(fetch(dataset, Selection([0], [2, 1]), indices), ((ids,), (label, mask)))


def test_arrays_of_this_package_have_two_parts():
    data = InMemory(np.arange(6.0).reshape(3, 2), np.arange(3))
    assert fetch(data, Selection(1), [2, 0])[0].tolist() == [2, 0]
    inputs, targets = fetch(data, Selection([0, 1]), [2])
    assert (inputs[0].tolist(), inputs[1].tolist(), targets) == ([[4.0, 5.0]], [2], None)


@pytest.mark.parametrize("name", [*BY_NAME, *BY_POSITION])
def test_single_samples_come_from_the_same_reading(name):
    dataset = {**BY_NAME, **BY_POSITION}[name]
    keys = NAMES if name in BY_NAME else [0, 1, 2]
    for selection in (Selection(keys[:2], keys[2]), Selection(keys[0])):
        fetcher = Fetcher(dataset, "data.train", 0, selection=selection)
        batch, singles = fetcher.read_with_singles(Request(0, np.array([3, 1])))
        assert same(tuple(batch), fetch(dataset, selection, [3, 1]))
        for single, index in zip(singles, [3, 1], strict=True):
            assert same(tuple(single), fetch(dataset, selection, [index]))


@given(st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=5), min_size=1, max_size=9))
def test_batches_that_are_read_together_are_those_that_are_read_alone(requests):
    for selection in (Selection([0, 1], 2), Selection(0), Selection([2])):
        dataset = BY_POSITION["TensorDataset"]
        fetcher = Fetcher(dataset, "data.train", 0, selection=selection)
        assert fetcher.reads_plainly
        together = list(InProcess(fetcher, [Request(0, np.array(each)) for each in requests]))
        assert len(together) == len(requests)
        for batch, indices in zip(together, requests, strict=True):
            assert same(tuple(batch), fetch(dataset, selection, indices))


@pytest.mark.parametrize(
    "selection", [Selection(0, 2), Selection(1), Selection([0, 1], 2), Selection([1, 0], [2])]
)
def test_rows_of_arrays_are_those_of_the_data_set(selection):
    dataset = BY_POSITION["TensorDataset"]
    arrays = find_arrays(dataset, selection)
    assert arrays.device == CPU
    chosen = {0, 2} if selection.input == 0 else {1} if selection.input == 1 else {0, 1, 2}
    assert arrays.nbytes == sum(dataset.tensors[number].nbytes for number in chosen)
    rows = move(arrays.to(CPU).rows(torch.tensor([4, 4, 0])), CPU)
    assert same(rows, fetch(dataset, selection, [4, 4, 0]))


def test_bytes_are_scaled_where_they_are_the_input_only(tmp_path):
    np.savez(
        tmp_path / "x.npz", x_train=np.arange(8, dtype=np.uint8).reshape(4, 2), y_train=range(4)
    )
    data = Arrays(str(tmp_path / "x.npz"))
    arrays = find_arrays(data, Selection(0))
    rows = move(arrays.rows(torch.tensor([3])), CPU)
    assert same(rows, fetch(data, Selection(0), [3]))
    assert find_arrays(data, Selection([0, 1])) is None
    assert fetch(data, Selection([0, 1]), [3])[0][0].dtype == torch.float32


@pytest.mark.parametrize(
    ("dataset", "selection", "message"),
    [
        (Rows(), Selection("pixels"), "data.input names pixels while data.train[4] has ids, mask,"),
        (Whole(), Selection("ids", "pixels"), "data.target names pixels while a batch of data.tra"),
        (
            ListOfRows(in_order),
            Selection(0, 3),
            "data.target names 3 while data.train[4] is a tupl",
        ),
        (
            TensorDataset(torch.zeros(N)),
            Selection([0, 1]),
            "data.input names 1 while a sample of data.train is a tuple of 1; give a position from",
        ),
        (range(N), Selection(0), "data.input names 0 while data.train[4] is a int; let samples be"),
    ],
)
def test_a_part_that_samples_lack_is_named_with_those_that_they_have(dataset, selection, message):
    fetcher = Fetcher(dataset, "data.train", 0, selection=selection)
    fault = fetcher.__getitems__(Request(0, np.array([4, 2])))
    assert isinstance(fault, Unreadable)
    assert fault.message.startswith(message)


def test_inputs_that_form_no_batch_are_named_without_a_target():
    ragged = [{"ids": torch.zeros(1 + index)} for index in range(N)]
    fetcher = Fetcher(ragged, "data.train", 0, selection=Selection("ids"))
    fault = fetcher.__getitems__(Request(0, np.array([4, 2])))
    assert fault.message.startswith("the input of data.train[4] has the shape (5,) and that of dat")
