import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_sgd.distributed.replica import Replica
from ddp_sgd.distributed.runtime import Runtime


def model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def gradients(replica):
    return torch.cat([p.grad.flatten() for p in replica.inner.parameters()]).tolist()


def test_alone_the_model_is_not_wrapped():
    inner = model()
    replica = Replica(inner, Runtime())
    assert replica.forward is replica.inner is inner
    with replica.sync_gradients(when=False):
        replica.forward(torch.ones(2, 3)).sum().backward()
    replica.sync_buffers()


def work(runtime, options):
    replica = Replica(model(seed=runtime.rank), runtime, **options)
    weights = torch.cat([p.detach().flatten() for p in replica.inner.parameters()]).tolist()
    inputs = torch.arange(12.0).reshape(4, 3) * (1 + runtime.rank)
    with replica.sync_gradients(when=False):
        (replica.forward(inputs) ** 2).sum().backward()
    apart = gradients(replica)
    with replica.sync_gradients(when=True):
        (replica.forward(inputs) ** 2).sum().backward()
    together = gradients(replica)
    before = replica.inner[1].running_mean.tolist()
    replica.sync_buffers()
    after = [b.tolist() for b in replica.inner.buffers()]
    return (
        weights,
        apart,
        together,
        before,
        after,
        isinstance(replica.forward, DistributedDataParallel),
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"bucket_mb": 1e-5}, {"gradient_as_bucket_view": False}, {"find_unused_parameters": True}],
)
def test_ranks_share_weights_gradients_and_in_the_end_buffers(options):
    first, second = run_ranks(2, work, options)
    assert first[0] == second[0]  # rank 0's weights
    assert first[1] != second[1]  # not reduced yet
    assert first[2] == second[2]  # reduced, equal to the last bit
    assert first[3] != second[3]  # each its own running statistics
    assert first[4] == second[4]
    assert first[4][0] == first[3]  # rank 0's
    assert first[5]
    assert second[5]


def forward_alone(runtime):
    replica = Replica(model(), runtime)
    if runtime.rank == 0:  # a forward pass must not wait for the other ranks
        for _ in range(3):
            replica.inner.eval()(torch.ones(2, 3))
    return True


def test_the_inner_module_talks_to_nobody():
    assert run_ranks(2, forward_alone) == [True, True]
