"""Models on a GPU: each takes the steps that plain torch takes on the CPU; needs CUDA."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from models.networks import channels_last
from models.samples import Listed, images
from models.test_exact_models import CASES, LAYOUTS, TOLERANCE, compare
from models.training import Case, Outcome, train, train_all
from ranks import run_ranks, srun_environment
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.distributed.runtime import start_runtime

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
# The weight that torch's CUDA kernel of weight_norm gives for a double v differs by up to 3e-8 from
# that of the CPU (measured by torch 2.11 on an H100, without ddp_sgd).
ROUNDING = dict.fromkeys(("weight_norm", "parametrized weight_norm"), 1e-7)


@pytest.fixture(scope="module")
def device():
    with start_runtime(device="cuda") as runtime:
        yield runtime


def on_cpu(outcome):
    """Move an outcome to where the expected one is."""
    moved = {
        field: {name: tensor.cpu() for name, tensor in getattr(outcome, field).items()}
        for field in ("parameters", "buffers")
    }
    return replace(outcome, **moved)


@pytest.mark.parametrize("name", CASES)
def test_one_rank(name, device, tmp_path):
    outcome = on_cpu(train(CASES[name], device, tmp_path, accumulate=3))
    compare(name, outcome, tolerance=ROUNDING.get(name, TOLERANCE))


@pytest.mark.parametrize("name", LAYOUTS)
def test_ddp(name, device, tmp_path):
    compare(name, on_cpu(train(CASES[name], device, tmp_path, parallel={"replica": "ddp"})))


def train_two(runtime, folder):
    return train_all(runtime, folder, {name: CASES[name] for name in LAYOUTS}, accumulate=2)


def test_two_ranks_on_one_gpu(tmp_path):
    options = {"device": "cuda", "backend": "gloo", "environment_of": srun_environment}
    first, second = run_ranks(2, train_two, tmp_path, **options)
    for name in LAYOUTS:
        outcomes = [Outcome.unpack(rank[name]) for rank in (first, second)]
        compare(name, on_cpu(outcomes[0]))
        assert outcomes[0].digest == outcomes[1].digest


def test_data_that_are_on_the_gpu(device, tmp_path):
    rows, labels = torch.randn(24, 6), torch.arange(24) % 3
    data = {
        "host": TensorDataset(rows, labels),
        "all": TensorDataset(rows.cuda(), labels.cuda()),
        "single": Listed((row.cuda(), label) for row, label in zip(rows, labels, strict=True)),
    }
    digests = {
        train(
            Case(model=partial(nn.Linear, 6, 3), data=lambda each=each: each, dtype=None),
            device,
            tmp_path / name,
        ).digest
        for name, each in data.items()
    }
    assert len(digests) == 1


def test_a_resumed_run_equals_one_that_was_not_stopped(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    case = Case(model=channels_last, data=images(dtype=torch.float32), dtype=None)
    changes = {"checkpoint": {"every_epochs": 1}, "schedule": {"name": "constant"}}
    whole = train(case, device, tmp_path / "whole", epochs=4, **changes)
    train(case, device, tmp_path / "cut", epochs=2, **changes)
    assert train(case, device, tmp_path / "cut", epochs=4, **changes).digest == whole.digest
