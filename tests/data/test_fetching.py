import random

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from ddp_sgd.data import Digits, InMemory
from ddp_sgd.data.fetching import Fetcher, Request, Unreadable, aligned


class Noisy:
    """Samples that draw from every generator that an augmentation may use."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        draws = [torch.rand(()).item(), random.random(), np.random.rand()]
        return torch.tensor([float(index), *draws]), index


class Broken(Noisy):
    def __init__(self, sample):
        self.sample = sample

    def __getitem__(self, index):
        return self.sample(index)


def fetch(dataset, indices, *, epoch=0, seed=0):
    return Fetcher(dataset, "data.train", seed).__getitems__(Request(epoch, np.array(indices)))


def test_a_whole_batch_equals_its_samples():
    digits = Digits("eval")
    whole = fetch(digits, [5, 3, 200])
    one_by_one = [digits[index] for index in range(360)]
    for dataset in (one_by_one, Subset(digits, range(360))):
        inputs, targets = fetch(dataset, [5, 3, 200])
        assert torch.equal(whole[0], inputs)
        assert torch.equal(whole[1], targets)


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.arange(10.0), torch.arange(10)),
        InMemory(torch.arange(10.0), torch.arange(10)),
        InMemory(np.arange(10.0), np.arange(10)),
    ],
)
def test_memory_is_read_whole(dataset):
    inputs, targets = fetch(dataset, [3, 1])
    assert (inputs.tolist(), targets.tolist()) == ([3.0, 1.0], [3, 1])


def test_a_data_set_of_ones_own_may_give_whole_batches():
    class Whole(Noisy):
        def __getitems__(self, indices):
            return torch.tensor(indices) + torch.rand(len(indices)), torch.tensor(indices)

    first, again = fetch(Whole(), [1, 2]), fetch(Whole(), [1, 2])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], fetch(Whole(), [1, 2], epoch=1)[0])


def test_data_sets_of_others_are_asked_for_python_integers():
    class Strict(Noisy):
        def __getitems__(self, indices):
            assert type(indices) is list
            assert {type(index) for index in indices} == {int}
            return np.array(indices, dtype=np.float32), np.array(indices)

    assert fetch(Strict(), [3, 1])[1].tolist() == [3, 1]

    class Each(Noisy):
        def __getitem__(self, index):
            assert type(index) is int
            return index, index

    assert fetch(Each(), [3, 1])[1].tolist() == [3, 1]


def test_random_numbers_follow_from_seed_epoch_and_index_only():
    alone = fetch(Noisy(), [3])[0][0]
    torch.rand(1), random.random(), np.random.rand()
    in_company = fetch(Noisy(), [6, 1, 3])[0][2]
    assert torch.equal(alone, in_company)
    others = [
        fetch(Noisy(), [3], epoch=1)[0][0],
        fetch(Noisy(), [3], seed=1)[0][0],
        fetch(Noisy(), [4])[0][0],
    ]
    for other in others:
        assert (other[1:] != alone[1:]).all()  # each generator


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda i: 1 / 0, r"data.train\[2\] cannot be read, ZeroDivisionError: .*; mend or remove"),
        (
            lambda i: {"x": 1, "y": 2},
            r"data.train\[2\] is a mapping with x, y, not \(input, target\); wrap",
        ),
        (lambda i: (1, 2, 3), r"data.train\[2\] is a tuple of 3, not"),
        (lambda i: 7, r"data.train\[2\] is a int, not"),
        (
            lambda i: (torch.zeros(i), 0),
            r"samples that do not form a batch \(from index 2 on\).*same shapes",
        ),
        (lambda i: (object(), 0), "samples that do not form a batch"),
    ],
)
def test_what_cannot_be_read_is_named(sample, message):
    fault = fetch(Broken(sample), [2, 3])
    assert isinstance(fault, Unreadable)
    assert "\n" not in fault.message
    import re

    assert re.search(message, fault.message)


class Shifted(TensorDataset):
    def __getitem__(self, index):
        return tuple(tensor + 100 for tensor in super().__getitem__(index))


class Doubled(Digits):
    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return 2 * inputs, target


class Jittered(Digits):
    def __getitems__(self, indices):
        inputs, targets = super().__getitems__(indices)
        return inputs + torch.rand(len(indices), 1).numpy(), targets


def test_a_subclass_reads_its_samples_its_own_way():
    inputs, targets = fetch(Shifted(torch.arange(10.0), torch.arange(10)), [3, 1])
    assert (inputs.tolist(), targets.tolist()) == ([103.0, 101.0], [103, 101])
    assert torch.equal(fetch(Doubled(), [5, 3])[0], 2 * fetch(Digits(), [5, 3])[0])


def test_a_subclass_that_draws_numbers_is_seeded():
    first, again = fetch(Jittered(), [5, 3]), fetch(Jittered(), [5, 3])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], fetch(Jittered(), [5, 3], epoch=1)[0])


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.arange(60.0).reshape(20, 3), torch.arange(20)),
        InMemory(np.arange(60.0, dtype=np.float32).reshape(20, 3), np.arange(20)),
        Noisy(),
    ],
)
def test_batches_that_are_read_together_are_those_read_one_by_one(dataset):
    fetcher = Fetcher(dataset, "data.train", seed=1)
    requests = [Request(2, np.array(indices)) for indices in ([3, 1, 2], [7], [0, 5, 4, 6, 1])]
    together = fetcher.read_ahead(requests)
    for (inputs, targets), request in zip(together, requests, strict=True):
        own_inputs, own_targets = fetcher.__getitems__(request)
        assert torch.equal(inputs, own_inputs)
        assert torch.equal(targets, own_targets)
        for tensor in (inputs, targets, own_inputs, own_targets):
            assert tensor.data_ptr() % 64 == 0  # products may round differently elsewhere


def test_one_batch_that_cannot_be_read_leaves_the_others():
    fetcher = Fetcher(InMemory(np.arange(8.0), np.arange(8)), "data.train", seed=0)
    first, bad, last = fetcher.read_ahead([Request(0, np.array([i])) for i in (3, 99, 5)])
    assert (first[1].tolist(), last[1].tolist()) == ([3], [5])
    assert isinstance(bad, Unreadable)
    assert "index 99" in bad.message


def test_who_may_draw_numbers_is_read_batch_by_batch():
    class Whole(InMemory):
        def __getitems__(self, indices):
            sizes.append(len(indices))
            return super().__getitems__(indices)

    sizes = []
    fetcher = Fetcher(Whole(torch.arange(8.0), torch.arange(8)), "data.train", seed=0)
    sizes.clear()
    fetcher.read_ahead([Request(0, np.array([1, 2])), Request(0, np.array([3]))])
    assert sizes == [2, 1]
    assert not fetcher.reads_plainly


def test_a_large_batch_stays_where_it_is():
    rows = np.zeros((2, 1 << 16), np.float32)
    assert aligned(torch.from_numpy(rows)[:, 1:]).data_ptr() == rows.ctypes.data + 4
    assert aligned(torch.arange(9.0)[1:]).data_ptr() % 64 == 0
