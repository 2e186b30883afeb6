"""Model state on real ranks: parameters and buffers become those of rank 0, whatever their form."""

import torch
from ranks import run_ranks
from torch import nn

from ddp_sgd.distributed.collectives import broadcast_buffers, broadcast_parameters
from ddp_sgd.distributed.runtime import Runtime


def share_transposed(runtime):
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.arange(12.0).reshape(4, 3).T + runtime.rank)
    broadcast_parameters(layer, runtime)
    return layer.weight.tolist(), layer.weight.stride()


def test_weights_that_are_not_contiguous():
    first, second = run_ranks(2, share_transposed)
    assert first == second == (torch.arange(12.0).reshape(4, 3).T.tolist(), (1, 3))


def different_buffers(runtime):
    """Buffers that are alike, resized, None, or not there on one of the ranks."""
    rank = runtime.rank
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Module())
    model[0].running_mean.fill_(5.0 - rank)
    part = model[1]
    part.register_buffer("cache", torch.arange(3.0 + 4 * rank), persistent=False)
    part.register_buffer("unset_on_0", None if rank == 0 else torch.ones(1))
    part.register_buffer("unset_on_1", None if rank == 1 else torch.ones(1))
    part.register_buffer("other_type", torch.ones(2, dtype=(torch.int64, torch.float32)[rank]))
    part.register_buffer("never_set", None)
    if rank == 0:
        part.register_buffer("made_on_0", torch.tensor([7.0]), persistent=False)
    broadcast_buffers(model, runtime)
    saved = {name for name in model.state_dict() if name.startswith("1")}
    return {name: buffer.tolist() for name, buffer in model.named_buffers()}, saved


def test_buffers_that_differ_in_shape_or_type_or_are_missing():
    first, second = run_ranks(2, different_buffers)
    assert first == second
    buffers, saved = first
    assert buffers == {
        "0.running_mean": [5.0, 5.0],
        "0.running_var": [1.0, 1.0],
        "0.num_batches_tracked": 0,
        "1.cache": [0.0, 1.0, 2.0],
        "1.unset_on_1": [1.0],
        "1.other_type": [1, 1],
        "1.made_on_0": [7.0],
    }
    assert saved == {"1.unset_on_1", "1.other_type"}


def test_alone_nothing_changes():
    model = nn.BatchNorm1d(2)
    before = model.running_mean
    broadcast_parameters(model, Runtime())
    broadcast_buffers(model, Runtime())
    assert model.running_mean is before
