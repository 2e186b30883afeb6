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
        runtime = Runtime(device=torch.device("cuda", 0))
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
