"""How worker processes start, and what leaves them; what they read is in test_loader.py."""

import multiprocessing

import pytest
import torch

from ddp_sgd.data.fetcher import Unreadable
from ddp_sgd.data.workers import Departure, start_method


def choose(monkeypatch, method):
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", context)


@pytest.mark.parametrize("chosen", ["spawn", "forkserver"])
def test_start_method_that_was_chosen_is_kept(chosen, monkeypatch):
    choose(monkeypatch, chosen)
    assert start_method() == chosen


def test_only_the_first_batch_is_tried():
    leave = Departure(2, "data.train")
    batch = torch.zeros(2), torch.zeros(2)
    assert leave(batch) is batch
    unpicklable = (lambda: None), torch.zeros(2)
    assert leave(unpicklable) is unpicklable
    refused = Departure(2, "data.train")(unpicklable)
    assert isinstance(refused, Unreadable)
    assert refused.message.startswith("data.workers is 2 while a batch of data.train cannot leave")
