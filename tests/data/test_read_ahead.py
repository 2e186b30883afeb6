"""Batches that are read several at a time in the rank are those that are read alone."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from ddp_sgd.data.fetcher import Fetcher, Request, Unreadable
from ddp_sgd.data.read_ahead import InProcess


def batches(dataset, sizes):
    fetcher = Fetcher(dataset, "data.train", 0)
    bounds = np.cumsum([0, *sizes])
    requests = [
        Request(2, np.arange(start, stop) % len(dataset)) for start, stop in pairwise(bounds)
    ]
    calls = []

    def read_ahead(burst):
        calls.append(len(burst))
        return Fetcher.read_ahead(fetcher, burst)

    fetcher.read_ahead = read_ahead
    return list(InProcess(fetcher, requests)), requests, fetcher, calls


@pytest.mark.parametrize("sizes", [[3], [3] * 50, [1, 2, 3, 4, 5] * 5])
def test_small_batches_come_together_in_order(sizes):
    dataset = TensorDataset(torch.randn(10, 3), torch.arange(10))
    found, requests, fetcher, calls = batches(dataset, sizes)
    assert len(found) == len(requests)
    for batch, request in zip(found, requests, strict=True):
        for part, alone in zip(batch, fetcher.__getitems__(request), strict=True):
            assert torch.equal(part, alone)
    assert calls[0] == 1
    assert sum(calls) == len(sizes)
    assert len(calls) <= 2


def test_large_batches_come_alone():
    dataset = TensorDataset(torch.zeros(4, 2**16), torch.arange(4))
    found, *_, calls = batches(dataset, [2, 2, 2])
    assert [len(inputs) for inputs, _ in found] == [2, 2, 2]
    assert calls == [1, 1, 1]


def test_a_fault_is_that_of_its_own_batch():
    dataset = TensorDataset(torch.zeros(4, 2), torch.arange(4))
    fetcher = Fetcher(dataset, "data.train", 0)
    requests = [Request(0, np.array(each)) for each in ([0], [1], [7], [2])]
    kinds = [isinstance(batch, Unreadable) for batch in InProcess(fetcher, requests)]
    assert kinds == [False, False, True, False]
