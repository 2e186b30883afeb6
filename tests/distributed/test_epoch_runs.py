"""``set_epoch`` of a data set: before the first read of an epoch, wherever samples are read."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from graphs import StopAt
from ranks import run_ranks
from torch import nn

from ddp_sgd.config import RunConfig
from ddp_sgd.data import InMemory
from ddp_sgd.data.fetcher import EVAL_EPOCH, Fetcher, Request, Unreadable
from ddp_sgd.data.placement import find_arrays
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import DataError

SAMPLES = 20


class Shifting:
    """Inputs that depend on the epoch; writes down which process was told of which epoch."""

    def __init__(self, log):
        self.log, self.shift = log, None

    def set_epoch(self, epoch):
        self.shift = float(epoch)
        with Path(self.log).open("a") as stream:
            stream.write(f"{os.getpid()} {epoch}\n")

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor([index + self.shift, 1.0]) / SAMPLES, index % 2


class Whole(Shifting):
    def __getitems__(self, indices):
        rows = torch.as_tensor(indices).float() + self.shift
        inputs = torch.stack([rows, torch.ones(len(rows))], dim=1) / SAMPLES
        return inputs, torch.as_tensor(indices) % 2


class Held:
    """Held-out samples; whoever tells them an epoch fails."""

    def set_epoch(self, epoch):
        raise AssertionError(epoch)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.ones(2), index % 2


def told(log):
    """Epochs that each process was told, in order."""
    calls = {}
    for line in Path(log).read_text().splitlines():
        process, epoch = map(int, line.split())
        calls.setdefault(process, []).append(epoch)
    return calls


def train(runtime, folder, kind=Shifting, *, looks=None, workers=0, batch=4):
    torch.manual_seed(0)
    config = RunConfig(
        output_dir=str(folder),
        epochs=4,
        data={"batch_size": batch, "workers": workers},
        wandb={"mode": "disabled"},
        schedule={"name": "constant"},
        log={"every_steps": 1},
        optim={"reference_batch": 4},
    )
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    return fit(
        config,
        runtime,
        model=nn.Linear(2, 2),
        train_set=kind(str(folder / "log")),
        eval_set=Held(),
        stop=None if looks is None else StopAt(looks),
    )


@pytest.mark.parametrize("kind", [Shifting, Whole])
def test_each_epoch_is_told_once_after_the_checks_of_epoch_0(kind, tmp_path):
    train(Runtime(), tmp_path, kind)
    (calls,) = told(tmp_path / "log").values()
    first = len(calls) - calls[::-1].index(0)
    assert set(calls[:first]) == {0}
    assert calls[first:] == [1, 2, 3]


@pytest.mark.parametrize("kind", [Shifting, Whole])
@pytest.mark.parametrize("workers", [0, 2])
def test_stops_and_loader_processes_change_no_bit(kind, workers, tmp_path):
    whole = train(Runtime(), tmp_path / "whole", kind)
    for looks in (7, 3, None):
        parts = train(Runtime(), tmp_path / "parts", kind, looks=looks, workers=workers)
    assert parts.status == whole.status == "finished"
    assert parts.weights_digest == whole.weights_digest
    calls = told(tmp_path / "parts" / "log")
    mine = calls.pop(os.getpid())
    assert set(mine) == ({0} if workers else {0, 1, 2, 3})
    assert len(calls) == 3 * workers
    for epochs in calls.values():
        assert epochs == sorted(set(epochs))


def test_ranks_take_the_same_steps_as_one(tmp_path):
    alone = train(Runtime(), tmp_path / "alone")
    ranks = run_ranks(2, _train_half, str(tmp_path / "ranks"))
    assert len(told(tmp_path / "ranks" / "log")) == 2
    assert {samples for samples, _ in ranks} == {alone.samples}
    for _, loss in ranks:
        assert loss == pytest.approx(alone.scores["eval/loss"], rel=1e-5)


def _train_half(runtime, folder):
    result = train(runtime, folder, batch=2)
    return result.samples, result.scores["eval/loss"]


class Failing(Shifting):
    def set_epoch(self, epoch):
        if epoch == 2:
            raise KeyError(f"shard-{epoch}")
        super().set_epoch(epoch)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_that_fails_is_one_line(workers, tmp_path):
    words = r"^data\.train\.set_epoch fails for epoch 2, KeyError: 'shard-2'; let it take the numb"
    with pytest.raises(DataError, match=words):
        train(Runtime(), tmp_path, Failing, workers=workers)


class Drawing(Shifting):
    def set_epoch(self, epoch):
        self.shift = np.random.random()  # as data sets do


def test_what_it_draws_follows_from_seed_and_epoch(tmp_path):
    def first_of(epochs, seed=0):
        fetcher = Fetcher(Drawing(str(tmp_path / "log")), "data.train", seed)
        return [fetcher.__getitems__(Request(e, np.array([0])))[0][0, 0].item() for e in epochs]

    assert first_of([0, 1, 3]) == [*first_of([0]), *first_of([1, 3])]
    assert len({*first_of([0, 1, 2]), *first_of([0], seed=1)}) == 4


def test_held_out_samples_are_read_without_an_epoch():
    fetcher = Fetcher(Held(), "data.eval", 0)
    assert not isinstance(fetcher.__getitems__(Request(EVAL_EPOCH, np.array([1]))), Unreadable)


def test_arrays_that_may_change_with_the_epoch_are_read_by_the_data_set():
    class Changing(InMemory):
        def set_epoch(self, epoch):
            self.inputs = self.inputs + epoch

    assert find_arrays(InMemory(torch.zeros(4, 2), torch.zeros(4))) is not None
    assert find_arrays(Changing(torch.zeros(4, 2), torch.zeros(4))) is None
