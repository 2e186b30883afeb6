"""What cannot be trained exactly is refused, with the fix."""

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ddp_sgd.config import RunConfig
from ddp_sgd.engine.model_check import (
    check_changed_parameters,
    check_embeddings,
    check_gradients,
    check_loss_parameters,
    check_model,
    is_dense,
)
from ddp_sgd.errors import ConfigError
from ddp_sgd.plan import make_plan


def plan(world_size=1, accumulate=1):
    config = RunConfig(data={"accumulate": accumulate, "batch_size": 2})
    return make_plan(config, samples=64, world_size=world_size)


def with_weight(tensor, *, requires_grad=True):
    module = nn.Module()
    module.weight = nn.Parameter(tensor, requires_grad=requires_grad)
    return nn.Sequential(module)


BASE = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (BASE[:, ::2], r"model.0.weight is of shape \(4, 3\) with strides \(6, 2\), .*contiguous"),
        (BASE[:, :3], "leaves gaps in its memory"),
        (torch.zeros(1, 6).expand(4, 6), "uses some twice"),
        (torch.zeros(4, 6, device="meta"), "on the device meta, without memory; build the model"),
        (torch.eye(3).to_sparse(), r"of the layout sparse_coo, .* make it dense with .to_dense"),
        (torch.zeros(3).to(torch.float8_e4m3fn), "of float8_e4m3fn, in which SGD cannot move"),
    ],
)
def test_parameters_that_cannot_be_moved(tensor, message):
    with pytest.raises(ConfigError, match=message):
        check_model(with_weight(tensor))
    if tensor.device.type != "meta":
        check_model(with_weight(tensor, requires_grad=False))  # nobody moves it


def test_a_parameter_in_shards():
    class DTensor(nn.Parameter):
        pass

    module = nn.Linear(2, 2)
    module.weight.__class__ = DTensor
    with pytest.raises(ConfigError, match="model.weight is a DTensor: sharded parameters are not"):
        check_model(module)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        nn.LSTM(3, 4),
        nn.LazyLinear(3),
        with_weight(torch.zeros(3, 4).t()),
        with_weight(torch.zeros(0, 3)),
        with_weight(torch.tensor(1.0)),
        with_weight(torch.zeros(3, dtype=torch.complex64)),
        with_weight(torch.zeros(3).bfloat16()),
    ],
)
def test_models_that_can_be_trained(module):
    check_model(module)


def wrapped(runtime):
    kept = DistributedDataParallel(nn.Linear(2, 2))
    messages = []
    for model in (kept, nn.Sequential(kept)):
        with pytest.raises(ConfigError) as caught:
            check_model(model)
        messages.append(str(caught.value))
    return messages


def test_models_that_are_wrapped():
    for outer, inner in run_ranks(2, wrapped):
        assert outer.startswith("model is wrapped in DistributedDataParallel; give the module its")
        assert inner.startswith("model.0 is wrapped in DistributedDataParallel; give the module")
    with pytest.raises(ConfigError, match="model is wrapped in DataParallel"):
        check_model(nn.DataParallel(nn.Linear(2, 2)))

    class FullyShardedDataParallel(nn.Sequential):
        pass

    with pytest.raises(ConfigError, match="wrapped in FullyShardedDataParallel; .* every rank"):
        check_model(FullyShardedDataParallel())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings(kind):
    check_embeddings(nn.Sequential(kind(3, 2)), plan(2, 2))
    check_embeddings(nn.Sequential(kind(3, 2, max_norm=1.0)), plan(1, 1))
    for several in (plan(2), plan(1, 2)):
        with pytest.raises(ConfigError, match=r"model.0 is an Embedding.* with max_norm=1.0"):
            check_embeddings(nn.Sequential(kind(3, 2, max_norm=1.0)), several)
    sparse = kind(3, 2, sparse=True)
    with pytest.raises(ConfigError, match="model.0 is an .* with sparse gradients, .*sparse=False"):
        check_embeddings(nn.Sequential(sparse), plan())
    sparse.requires_grad_(False)
    check_embeddings(nn.Sequential(sparse), plan())


def test_parameters_that_a_pass_changes():
    model = nn.Linear(2, 2)
    check_changed_parameters(model, [], plan(2))
    check_changed_parameters(model, [model.bias], plan(1))
    with pytest.raises(ConfigError, match="model.bias is changed by the forward pass, while a ste"):
        check_changed_parameters(model, [model.bias], plan(2))


def test_sparse_gradients_of_one_s_own():
    model = with_weight(torch.zeros(3, 2))
    nn.functional.embedding(torch.tensor([1]), model[0].weight, sparse=True).sum().backward()
    with pytest.raises(ConfigError, match="model.0.weight is given sparse gradients"):
        check_gradients(model)
    model[0].weight.grad = torch.zeros(3, 2)
    check_gradients(model)


def test_parameters_of_a_loss():
    frozen = nn.Linear(2, 2).requires_grad_(False)
    check_loss_parameters({"loss": nn.CrossEntropyLoss(), "teacher": frozen})
    with pytest.raises(ConfigError, match="loss is Linear with the parameter weight, which would"):
        check_loss_parameters({"loss": nn.Linear(2, 2)})
    with pytest.raises(ConfigError, match=r"loss is Linear \(head\) with the parameter weight"):
        check_loss_parameters({"head": nn.Linear(2, 2)})


@pytest.mark.parametrize(
    ("tensor", "right"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3).t(), True),
        (torch.zeros(2, 3, 4).permute(2, 0, 1), True),
        (torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
        (torch.zeros(2, 1, 3)[:, :, :], True),
        (torch.zeros(()), True),
        (torch.zeros(4)[::2], False),
        (torch.zeros(2, 3)[:, :2], False),
        (torch.zeros(1).expand(3), False),
        (torch.zeros(5).unfold(0, 3, 1), False),
    ],
)
def test_memory_without_gaps_and_overlap(tensor, right):
    assert is_dense(tensor) is right
