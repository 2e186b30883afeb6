"""Promise 1: any split of a global batch over ranks and micro-batches takes the same step."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn

from ddp_sgd.config import RunConfig
from ddp_sgd.data import InMemory
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.result import weights_digest

SIZES = (1, 7, 64, 65, 1437)
SPLITS = [(world, accumulate) for world in (1, 2, 3, 4) for accumulate in (1, 2, 4)]
GLOBAL_BATCH = 48  # the least common multiple of all splits

# A float32 sum of k terms in another order differs by about sqrt(k) units of 6e-8; thirty steps of
# it, through a momentum of 0.9, stay below 2e-6. In float64 the unit is 1.1e-16.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def samples(n, dtype, unlabelled=()):
    generator = torch.Generator().manual_seed(n)
    inputs = torch.randn(n, 6, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, 4, (n,), generator=generator)
    labels[list(unlabelled)] = -100  # which torch's cross entropy leaves out unasked
    return InMemory(inputs, labels)


def network(dtype):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def run(
    runtime,
    folder,
    n,
    dtype,
    accumulate,
    *,
    batch=GLOBAL_BATCH,
    loss=None,
    epochs=1,
    unlabelled=(),
    **optim,
):
    config = RunConfig(
        name=f"n{n}",
        output_dir=str(folder),
        resume="never",  # the runs differ in what no configuration says
        epochs=epochs,
        data={"batch_size": batch // (runtime.world_size * accumulate), "accumulate": accumulate},
        optim={"lr": 0.05, "reference_batch": batch, "momentum": 0.9} | optim,
        wandb={"mode": "disabled"},
    )
    model = network(dtype)
    loss = loss or nn.CrossEntropyLoss()
    fit(config, runtime, model=model, train_set=samples(n, dtype, unlabelled), loss=loss)
    flat = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    return flat.numpy(), weights_digest(model)


def every_split(runtime, folder):
    return {
        (n, dtype, accumulate): run(runtime, folder, n, dtype, accumulate)
        for n in SIZES
        for dtype in TOLERANCE
        for accumulate in (1, 2, 4)
    }


def options(runtime, folder):
    """Clipping, decay, Nesterov, and losses whose unit is not the sample, on one split for each
    number of ranks.
    """
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 3.0, 0.5], dtype=torch.float64))
    ignoring = nn.CrossEntropyLoss(ignore_index=2)
    cases = {
        "clipped": {"clip_norm": 0.05},
        "clipped by value": {"clip_value": 0.001},
        "nesterov": {"nesterov": True, "weight_decay": 0.01},
        "class weights": {"loss": weighted},
        "ignored class": {"loss": ignoring},
        "samples without a label": {"unlabelled": range(0, 65, 3)},
    }
    return {
        name: run(runtime, folder, 65, torch.float64, 2, batch=24, epochs=2, **case)
        for name, case in cases.items()
    }


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return run_ranks(1, every_split, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_any_split_of_a_batch_takes_the_same_steps(world_size, reference, tmp_path):
    ranks = run_ranks(world_size, every_split, tmp_path)
    for (n, dtype, accumulate), (weights, _) in ranks[0].items():
        expected, _ = reference[n, dtype, 1]
        assert relative(weights, expected) <= TOLERANCE[dtype], (n, dtype, accumulate)
        start = torch.cat([p.detach().flatten() for p in network(dtype).parameters()]).numpy()
        assert relative(weights, start) > 1e-4
    for rank in ranks[1:]:
        assert {key: digest for key, (_, digest) in rank.items()} == {
            key: digest for key, (_, digest) in ranks[0].items()
        }


def test_options_do_not_depend_on_the_split(tmp_path):
    expected = run_ranks(1, options, tmp_path / "alone")[0]
    for name, (weights, _) in run_ranks(3, options, tmp_path / "ranks")[0].items():
        assert relative(weights, expected[name][0]) <= 1e-12, name
