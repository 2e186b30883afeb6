"""Orders that tests name in a configuration, and runs with them."""

import os

import numpy as np
import torch
from graphs import StopAt
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig
from ddp_sgd.engine.fit import fit

SAMPLES = 30


def with_repeats(n, seed, epoch, global_batch):
    """Read 37 samples of 30, some of them more than once."""
    return np.random.default_rng((seed, epoch)).integers(0, n, 37)


def by_batch(n, seed, epoch, global_batch):
    """Read whole global batches of the same sample."""
    return np.repeat(np.arange(5), global_batch)


def by_rank(n, seed, epoch, global_batch):
    """Read what no two ranks agree on."""
    return np.roll(np.arange(n), int(os.environ.get("RANK", "0")))


def shorter_later(n, seed, epoch, global_batch):
    """Read one sample less in every epoch."""
    return np.arange(n - epoch)


def named(function):
    return {"class_path": f"orders.{function.__name__}", "call": False}


def data():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
    return TensorDataset(inputs, torch.arange(SAMPLES) % 4)


def train(runtime, folder, order, *, looks=None, dtype=torch.float64, **sections):
    """Train for three epochs with an order; gives the result, and the weights as one vector."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).to(dtype)
    inputs, targets = data().tensors
    dataset = TensorDataset(inputs.to(dtype), targets)
    given = {"batch_size": 8, **sections.pop("data", {}), "order": order}
    basis = {"epochs": 3, "wandb": {"mode": "disabled"}, "log": {"every_steps": 1}}
    config = RunConfig(output_dir=str(folder), **basis | sections, data=given)
    stop = None if looks is None else StopAt(looks)
    result = fit(config, runtime, model=model, train_set=dataset, stop=stop)
    return result, torch.cat([p.detach().flatten() for p in model.parameters()])
