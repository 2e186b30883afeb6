"""Data sets whose tensors are on the GPU already; needs CUDA."""

import pytest
import torch
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Digits, InMemory
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.models import MLP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


DEVICE = torch.device("cuda", 0)


class Samples(TensorDataset):
    """Read one by one."""

    def __getitem__(self, index):
        return super().__getitem__(index)


@pytest.mark.parametrize("kind", [TensorDataset, InMemory, Samples])
@pytest.mark.parametrize("weights", [None, torch.ones(10)])
def test_data_on_the_device_give_the_run_of_data_on_the_host(kind, weights, tmp_path):
    digits = Digits()
    parts = torch.from_numpy(digits.inputs), torch.from_numpy(digits.targets)
    scores = []
    for name, device in (("host", "cpu"), ("device", "cuda")):
        torch.manual_seed(0)
        data = kind(*(part.to(device) for part in parts))
        config = RunConfig(
            output_dir=str(tmp_path), name=name, epochs=1, wandb={"mode": "disabled"}
        )
        runtime = Runtime(device=DEVICE)
        result = fit(
            config,
            runtime,
            model=MLP(64, [], 10),
            train_set=data,
            eval_set=data,
            loss=torch.nn.CrossEntropyLoss(weight=weights),
        )
        scores.append(result.scores)
    assert scores[0] == scores[1]


class Added(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(64, 10)

    def forward(self, pixels, noise):
        return self.layer(pixels + noise)


def spread(outputs):
    return (outputs.square().mean(dim=1) - 1).square().mean()


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("order", ["sequential", {"class_path": "orders.by_batch", "call": False}])
def test_orders_and_chosen_parts_are_the_same_on_the_device(order, target, captured, tmp_path):
    digits = Digits()
    pixels, labels = torch.from_numpy(digits.inputs), torch.from_numpy(digits.targets)
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(pixels, labels, 0.1 * noise)
    ends = []
    for place in ("host", "accelerator"):
        torch.manual_seed(0)
        config = RunConfig(
            output_dir=str(tmp_path),
            name=place,
            epochs=2,
            data={"device": place, "order": order, "input": [0, 2], "target": target},
            compute={"cuda_graphs": captured},
            wandb={"mode": "disabled"},
        )
        result = fit(
            config,
            Runtime(device=DEVICE),
            model=Added(),
            train_set=data,
            eval_set=data,
            loss=spread if target is None else torch.nn.CrossEntropyLoss(),
        )
        ends.append((result.weights_digest, result.scores))
    assert ends[0] == ends[1]
