"""Buckets are those of all steps to come, before the first step."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed import GradBucket
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits
from ddp_sgd.distributed.data_parallel import settle_buckets
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.models import MLP
from ddp_sgd.optim.sgd import SGD


class Counted(nn.Sequential):
    """Counts its passes."""

    passes = 0

    def forward(self, inputs):
        self.passes += 1
        return super().forward(inputs)


def layout(runtime):
    """Buckets of each pass by the names in them, and what settling left behind."""
    model = Counted(*[nn.Linear(60, 60) for _ in range(6)])
    model[1].requires_grad_(False)
    names = {p: name for name, p in model.named_parameters()}
    seen = []

    def hook(state: object, bucket: GradBucket) -> Future[torch.Tensor]:
        seen.append((bucket.index(), [names[p] for p in bucket.parameters()]))
        done = Future()
        done.set_result(bucket.buffer())
        return done

    ddp = DistributedDataParallel(model, bucket_cap_mb=0.03)
    ddp.register_comm_hook(None, hook)
    settle_buckets(ddp)
    traces = model.passes, [p.grad for p in model.parameters() if p.grad is not None]
    seen.clear()
    passes = []
    for _ in range(3):
        ddp(torch.ones(4, 60)).sum().backward()
        passes.append(tuple(map(str, seen)))
        seen.clear()
    return passes, traces, ddp.module is model


def test_buckets_do_not_change_any_more():
    for passes, traces, is_back in run_ranks(2, layout):
        assert len(passes[0]) > 1
        assert "5.bias" in passes[0][0]  # the last layer first: its gradient is there first
        assert set(passes) == {passes[0]}
        assert traces == (0, [])
        assert is_back


def life(runtime, folder, bucket_mb, stop_after):
    torch.manual_seed(0)
    wish, taken, inner = StopRequest(), [0], SGD.step

    def counted(*arguments):
        inner(*arguments)
        taken[0] += 1
        if taken[0] == stop_after:
            wish.ask("the test")

    SGD.step = counted
    config = RunConfig(
        output_dir=str(folder),
        epochs=1,
        log={"every_steps": 1},
        data={"batch_size": 16, "eval": None},
        parallel={"replica": "ddp", "bucket_mb": bucket_mb},
        wandb={"mode": "disabled"},
    )
    model = MLP(64, [64, 64], 10)
    return fit(config, runtime, model=model, train_set=Digits(), stop=wish).weights_digest


@pytest.mark.parametrize("bucket_mb", [25.0, 0.02])
def test_on_three_ranks_stop_and_resume_give_the_same_bits(bucket_mb, tmp_path):
    """The sum of three numbers depends on the place in a bucket, that of two does not."""
    whole = run_ranks(3, life, tmp_path / "whole", bucket_mb, -1)
    run_ranks(3, life, tmp_path / "parts", bucket_mb, 9)
    assert run_ranks(3, life, tmp_path / "parts", bucket_mb, -1) == whole
