"""A regression that is scored on several held-out sets, and at its end on a test set.

The first set says which weights are best; the test set is scored once, with those.
"""

import copy

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

CONFIG = {
    "epochs": 4,
    "loss": {"class_path": "torch.nn.MSELoss"},
    "data": {
        "train": {"class_path": "ports.held_out_sets.line", "init_args": {"samples": 21}},
        "eval": {
            "near": {"class_path": "ports.held_out_sets.line", "init_args": {"samples": 7}},
            "far": {
                "class_path": "ports.held_out_sets.line",
                "init_args": {"samples": 5, "shift": 2.0},
            },
        },
        "test": {"class_path": "ports.held_out_sets.line", "init_args": {"samples": 9}},
        "batch_size": 8,
    },
    "optim": {"lr": 0.2, "reference_batch": 8, "momentum": 0.9},
    "schedule": {"name": "constant"},
}


def line(samples, shift=0.0):
    """Make noisy points of a curve."""
    drawn = torch.Generator().manual_seed(samples)
    inputs = torch.randn(samples, 3, generator=drawn) + shift
    noise = 0.5 * torch.randn(samples, 1, generator=drawn)
    return TensorDataset(inputs, inputs.sum(1, keepdim=True).sin() + noise)


def build_model():
    """Build a small network."""
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def by_hand(model, epochs):
    """Train as a script does that keeps the weights which are best on the first set."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    best, lowest = None, float("inf")
    for epoch in epochs:
        for inputs, targets in epoch:
            optimizer.zero_grad()
            functional.mse_loss(model(inputs), targets).backward()
            optimizer.step()
        scores = {
            "eval/near/loss": loss_of(model, line(7)),
            "eval/far/loss": loss_of(model, line(5, 2.0)),
        }
        if scores["eval/near/loss"] < lowest:
            best, lowest = copy.deepcopy(model), scores["eval/near/loss"]
    return scores | {"test/loss": loss_of(best, line(9))}


def loss_of(model, held_out):
    """Compute the mean over a set."""
    inputs, targets = held_out.tensors
    with torch.no_grad():
        return functional.mse_loss(model(inputs), targets)
