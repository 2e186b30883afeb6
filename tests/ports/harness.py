"""Runs a port by ``fit`` on any split over ranks and micro-batches, and by its plain torch loop.

A port is a module of this folder with

* ``CONFIG``: the configuration of the run on one rank, as a YAML file would have it. The
  ``data.batch_size`` of it is the global batch, which is kept on every split;
* ``build_model()``;
* ``by_hand(model, epochs)``: the script's own loop over whole batches, a list of them per epoch. It
  changes the model, and returns the scores that it works out, if any, under the run's names.

All computes in float64, whose rounding says what is a difference and what is not.
"""

import io
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from graphs import StopAt
from torch.utils.data import default_collate

from ddp_sgd.config import RunConfig
from ddp_sgd.data.sampler import TrainSampler
from ddp_sgd.engine.fit import fit
from ddp_sgd.instantiate import instantiate

NAMES = sorted(
    file.stem
    for file in Path(__file__).parent.glob("*.py")
    if file.stem != "harness" and not file.stem.startswith("test_")
)


def port_of(name):
    """Import a port."""
    return import_module(f"ports.{name}")


@contextmanager
def double_precision():
    """Have tensors of numbers made in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_model(port):
    """Build the model of a port, the same at every call."""
    torch.manual_seed(1)
    return port.build_model()


def describe(port, folder, *, ranks=1, accumulate=1, **changes):
    """Describe the run of a port; the global batch is the same on every split."""
    data = dict(port.CONFIG["data"])
    data["batch_size"] //= ranks * accumulate
    data["accumulate"] = accumulate
    others = {
        "output_dir": str(folder),
        "data": data | changes.pop("data", {}),
        "eval": {"batch_size": port.CONFIG["data"]["batch_size"]} | port.CONFIG.get("eval", {}),
        "log": {"every_steps": 1} | port.CONFIG.get("log", {}),  # so a stop is heard at once
        "wandb": {"mode": "disabled"},
    }
    return RunConfig.model_validate({"name": "port", **port.CONFIG} | others | changes)


def train(port, runtime, folder, *, accumulate=1, stop=None, **changes):
    """Train a port; returns its weights, scores and digest, packed for a pipe."""
    with double_precision():
        model = build_model(port)
        config = describe(port, folder, ranks=runtime.world_size, accumulate=accumulate, **changes)
        result = fit(config, runtime, model=model, stop=stop)
    outcome = {
        "weights": weights_of(model),
        "scores": result.scores,
        "digest": result.weights_digest,
        "status": result.status,
        "step": result.step,
    }
    file = io.BytesIO()
    torch.save(outcome, file)
    return file.getvalue()


def unpacked(outcome):
    """Unpack what ``train`` has packed."""
    return torch.load(io.BytesIO(outcome))


def train_in_two_attempts(port, runtime, folder, **options):
    """Train a port, stop it after two steps, and let it go on to its end."""
    stopped = unpacked(train(port, runtime, folder, stop=StopAt(1), **options))
    if stopped["status"] != "stopped":
        raise RuntimeError(f"the run is {stopped['status']} after {stopped['step']} steps")
    return train(port, runtime, folder, **options)


def take_by_hand(port):
    """Take the steps of a port by its plain torch loop; returns the weights and the scores."""
    with double_precision():
        model = build_model(port)
        scores = port.by_hand(model, whole_batches(port)) or {}
    return weights_of(model), scores


def whole_batches(port):
    """Read the whole batches of a run in their order, a list of them per epoch."""
    config = describe(port, "runs")
    samples = instantiate(config.data.train, "data.train")
    collate = instantiate(config.data.collate, "data.collate") if config.data.collate else None
    size, epochs, left = config.data.batch_size, [], getattr(config, "steps", None)
    for epoch in range(config.epochs):
        if hasattr(samples, "set_epoch"):
            samples.set_epoch(epoch)
        order = order_of(config, len(samples), epoch)
        ends = range(size, len(order) + (size if config.data.tail == "exact" else 1), size)
        batches = [order[end - size : end].tolist() for end in ends]
        read = [[samples[index] for index in batch] for batch in batches[:left] if batch]
        epochs.append([(collate or default_collate)(batch) for batch in read])
        left = left and left - len(read)
        if left == 0:
            break
    return epochs


def order_of(config, samples, epoch):
    """Give the indices of an epoch, one after the other."""
    order, batch = getattr(config.data, "order", "shuffled"), config.data.batch_size
    if order == "sequential":
        return np.arange(samples)
    if order == "shuffled":
        one = {"rank": 0, "world_size": 1, "seed": config.seed}
        sampler = TrainSampler(samples, global_batch=batch, batch_size=batch, **one)
        sampler.set_epoch(epoch)
        return sampler.permutation()
    component = instantiate(order, "data.order")
    return np.asarray(component(samples, config.seed, epoch, batch))


def weights_of(model):
    """Copy the parameters of a model, frozen ones too."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def distance(weights, expected):
    """Return the relative L2 distance of all weights, taken together."""
    assert weights.keys() == expected.keys()
    far = [(weights[name] - each).norm() for name, each in expected.items()]
    return float(
        torch.stack(far).norm() / torch.stack([*map(torch.norm, expected.values())]).norm()
    )
