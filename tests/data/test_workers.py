"""How worker processes start, and what leaves them; what they read is in test_loader.py."""

import gc
import multiprocessing
import os

import pytest
import torch
from ranks import run_ranks
from torch.utils.data import DataLoader

from ddp_sgd.data.fetcher import Unreadable
from ddp_sgd.data.workers import (
    Departure,
    flag_of_leaving,
    leave_signals_to_the_rank,
    start_method,
    start_workers,
)


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


class Garbage:
    """Holds itself, and tells which process collects it."""

    def __init__(self, pipe):
        self.pipe, self.itself = pipe, self

    def __del__(self):
        self.pipe.send(os.getpid())


def leave_garbage_to_a_loader_process(runtime):
    """Collections, which the rank has few of, are due at once in the process that is forked."""
    told, pipe = multiprocessing.Pipe(duplex=False)
    os.register_at_fork(before=lambda: Garbage(pipe), after_in_child=lambda: gc.set_threshold(1))
    gc.set_threshold(10**6)
    loader = DataLoader(
        torch.arange(4),
        num_workers=1,
        multiprocessing_context="fork",
        worker_init_fn=lambda number: leave_signals_to_the_rank(flag_of_leaving(), number),
        collate_fn=lambda samples: (samples, gc.isenabled(), gc.collect()),
    )
    batches = list(start_workers(loader))
    gc.collect()
    pids = [told.recv() for _ in iter(told.poll, False)]
    return (
        len(batches),
        all(is_on for _, is_on, _ in batches),
        gc.isenabled(),
        set(pids),
        os.getpid(),
    )


def test_garbage_of_a_rank_is_not_collected_by_its_loader_processes():
    ((batches, *enabled, collected_in, rank),) = run_ranks(1, leave_garbage_to_a_loader_process)
    assert (batches, enabled) == (4, [True, True])
    assert collected_in == {rank}
