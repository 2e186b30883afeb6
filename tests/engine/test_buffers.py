"""Buffers that steps change: rank 0's before a step, and as before where a step is skipped."""

import pytest
import torch
from ranks import run_ranks
from torch import nn

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import TrainingBuffers, buffers_by_name, is_saved, statistics_of

YES, NO = torch.ones(()), torch.zeros(())


class Holder(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.arange(6.0).reshape(2, 3).t())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("narrow", torch.ones(2, dtype=torch.float16), persistent=False)

    def buffers_now(self):
        return [buffer.tolist() for buffer in self.buffers()]


def tracked(module):
    places = [(module, name) for name in module._buffers]
    return TrainingBuffers(places, places, Runtime())


def change_in_place(module):
    module.mean.mul_(float("nan"))
    module.count.add_(1)
    module.narrow.zero_()


def assign(module):
    module.mean = module.mean * float("nan")
    module.count = module.count + 1
    module.narrow = torch.zeros_like(module.narrow)


@pytest.mark.parametrize("change", [change_in_place, assign])
def test_a_skipped_step_leaves_buffers_as_they_were(change):
    module = Holder()
    buffers, before = tracked(module), module.buffers_now()
    for skipped in (NO, YES, YES, NO):
        module.mean, module.count = torch.arange(6.0).reshape(2, 3).t(), torch.tensor(0)
        module.narrow = torch.ones(2, dtype=torch.float16)
        buffers.keep()
        change(module)
        after = str(module.buffers_now())
        buffers.restore_where(skipped)
        assert str(module.buffers_now()) == (str(before) if skipped else after)
    assert module.mean.dtype == torch.float32
    assert module.count.dtype == torch.int64


def test_what_is_written_in_place_stays_the_same_tensor():
    module = Holder()
    buffers, mean = tracked(module), module.mean
    buffers.keep()
    change_in_place(module)
    buffers.restore_where(YES)
    assert module.mean is mean
    assert mean.stride() == (1, 3)


def test_an_assigned_buffer_may_share_memory_that_is_not_its_own():
    module, weight = Holder(), torch.full((3, 2), 7.0)
    buffers = tracked(module)
    buffers.keep()
    module.mean = weight
    buffers.restore_where(YES)
    assert weight.tolist() == [[7, 7]] * 3
    assert module.mean.tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("skipped", [YES, NO])
def test_a_buffer_that_gets_its_size_in_the_step(skipped):
    module = nn.Module()
    module.register_buffer("low", torch.empty(0))
    buffers = tracked(module)
    for _ in range(2):
        buffers.keep()
        module.low.resize_(4).fill_(2.0)
        buffers.restore_where(skipped)
        assert module.low.shape == ((0,) if skipped else (4,))


def test_names_places_and_statistics():
    shared = nn.BatchNorm1d(2)
    model = nn.Sequential(shared, Holder(), shared, nn.InstanceNorm1d(2))
    named = buffers_by_name({"": model})
    assert list(named) == [
        *("0.running_mean", "0.running_var", "0.num_batches_tracked"),
        *("1.mean", "1.count", "1.narrow"),
    ]
    assert named["1.narrow"] == (model[1], "narrow")
    assert list(buffers_by_name({"a": model[1], "b": Holder()}))[:4] == [
        *("a.mean", "a.count", "a.narrow", "b.mean"),
    ]
    assert [name for _, name in dict.fromkeys(statistics_of([model]))] == [
        *("running_mean", "running_var", "num_batches_tracked"),
    ]
    assert [is_saved(place) for place in named.values()] == [True] * 5 + [False]


def test_nothing_to_do():
    buffers = TrainingBuffers([], [], Runtime())
    assert not buffers
    assert not buffers.synced
    module = Holder()
    alone = tracked(module)
    assert alone
    assert not alone.synced
    alone.sync()
    assert (module, "mean") in alone
    assert (module, "other") not in alone


def synced(runtime):
    module = Holder()
    module.mean = module.mean + runtime.rank
    module.count = module.count + runtime.rank
    places = [(module, name) for name in ("mean", "count", "narrow")]
    buffers = TrainingBuffers(places, places[:1], runtime)
    assert buffers.synced
    buffers.sync()
    return module.mean.tolist(), module.count.item()


def test_what_training_reads_becomes_that_of_rank_0():
    (first, count_0), (second, count_1) = run_ranks(2, synced)
    assert first == second == [[0, 3], [1, 4], [2, 5]]
    assert (count_0, count_1) == (0, 1)  # a statistic, which nobody reads in training
