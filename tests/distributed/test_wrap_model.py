"""Which replica a run gets, and that all of them give the same weights."""

import pytest
import torch
from ranks import run_ranks

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits
from ddp_sgd.distributed.data_parallel import wrap_model
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.models import ConvNet
from ddp_sgd.optim.sgd import build_sgd
from ddp_sgd.plan import make_plan


def chosen(runtime, options):
    model = ConvNet(channels=1, widths=[4])
    config = RunConfig(parallel=options)
    plan = make_plan(config, samples=100, world_size=runtime.world_size)
    momentum_buffers = build_sgd(model, momentum=0.9).momentum_buffers
    return type(wrap_model(model, runtime, config.parallel, plan, momentum_buffers)).__name__


CHOICES = [
    ({}, "FlatAllReduce", "FlatAllReduce"),
    ({"replica": "flat", "bucket_mb": 1e-5}, "FlatAllReduce", "FlatAllReduce"),
    ({"bucket_mb": 1e-5}, "DataParallelModel", "WrappedDDP"),
    ({"replica": "ddp"}, "DataParallelModel", "WrappedDDP"),
    ({"static_graph": True}, "DataParallelModel", "WrappedDDP"),
    ({"find_unused_parameters": True}, "DataParallelModel", "WrappedDDP"),
    ({"compression": "powersgd"}, "FlatAllReduce", "WrappedDDP"),
    ({"local_sgd": {"start_step": 3}}, "FlatAllReduce", "LocalSGD"),
]


def all_chosen(runtime):
    return [chosen(runtime, options) for options, _, _ in CHOICES]


def test_the_rule_alone():
    assert all_chosen(Runtime()) == [alone for _, alone, _ in CHOICES]


def test_the_rule_on_two_ranks():
    assert run_ranks(2, all_chosen) == [[together for *_, together in CHOICES]] * 2


def train(runtime, folder, wrapper, bucket_mb):
    torch.manual_seed(0)
    model = ConvNet(channels=1, widths=[4, 8])
    config = RunConfig(
        name=f"{wrapper}-{bucket_mb}",
        output_dir=str(folder),
        epochs=2,
        data={"batch_size": 48 // runtime.world_size, "eval": None},
        optim={"lr": 0.1, "reference_batch": 48, "weight_decay": 1e-3, "clip_norm": 1.0},
        parallel={"replica": wrapper, "bucket_mb": bucket_mb},
        wandb={"mode": "disabled"},
    )
    result = fit(config, runtime, model=model, train_set=Digits(shape="image"))
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return result.weights_digest, weights.numpy()


def every_replica(runtime, folder):
    pairs = (("flat", 25.0), ("ddp", 25.0), ("ddp", 1e-4), ("auto", 25.0), ("auto", 1e-4))
    return [train(runtime, folder, *pair) for pair in pairs]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_all_give_the_same_weights(world_size, tmp_path):
    """To rounding: norms add up in another order, and so, on three ranks, do gradients.

    60 steps of float32 rounding, 6e-8 each, grow like a random walk, and fourfold through a
    momentum of 0.9: sqrt(60) x 6e-8 x 4 = 2e-6.
    """
    (flat, *others), *_ = run_ranks(world_size, every_replica, tmp_path)
    assert others[2][0] == flat[0]  # auto is flat
    for _, weights in others:
        assert abs(weights - flat[1]).max() <= 2e-6 * abs(flat[1]).max()
