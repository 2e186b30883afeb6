"""BYOL: an online network predicts what a slowly moving target makes of the other view.

After each step the target moves towards the online network, less and less: its momentum rises along
a cosine, a function of the step. BatchNorm of the heads is left out.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

STEPS, MOMENTUM = 7, 0.9
CONFIG = {
    "steps": STEPS,
    "loss": {"class_path": "ports.byol.criterion", "call": False},
    "data": {
        "train": {"class_path": "ports.byol.views"},
        "eval": None,
        "input": [0, 1],
        "batch_size": 8,
    },
    "optim": {"lr": 0.1, "reference_batch": 8, "momentum": 0.9},
    "schedule": {"name": "cosine", "warmup_steps": 2, "warmup_start": 0.5},
}


class BYOL(nn.Module):
    """Online network with a predictor, and the target, which is frozen."""

    def __init__(self):
        super().__init__()
        self.online = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.predictor = nn.Linear(8, 8)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, first, second):
        """Return the predictions, and what they are to be, of both views."""
        predictions = [self.predictor(self.online(view)) for view in (first, second)]
        return predictions, [self.target(view) for view in (second, first)]

    def after_step(self, step):
        """Move the target."""
        momentum = 1 - (1 - MOMENTUM) * (math.cos(math.pi * step / STEPS) + 1) / 2
        for slow, fast in zip(self.target.parameters(), self.online.parameters(), strict=True):
            slow.lerp_(fast, 1 - momentum)


def criterion(outputs):
    """Compute the distance of normalized vectors, of both views."""
    pairs = [map(functional.normalize, pair) for pair in zip(*outputs, strict=True)]
    return sum((prediction - target).square().sum(1).mean() for prediction, target in pairs)


def views():
    """Make two views of each image, and its class, which is not used."""
    drawn = torch.Generator().manual_seed(3)
    images = torch.randn(21, 6, generator=drawn)
    noise = 0.1 * torch.randn(2, 21, 6, generator=drawn)
    return TensorDataset(*(images + noise), torch.arange(21))


build_model = BYOL


def by_hand(model, epochs):
    """Train as the script does."""
    parameters = [*model.online.parameters(), *model.predictor.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    steps = [batch for epoch in epochs for batch in epoch]
    for step, (first, second, _) in enumerate(steps):
        decay = (1 + math.cos(math.pi * step / len(steps))) / 2
        optimizer.param_groups[0]["lr"] = 0.1 * decay * min(1.0, 0.5 + 0.5 * step / 2)
        optimizer.zero_grad()
        criterion(model(first, second)).backward()
        optimizer.step()
        keep = 1 - (1 - MOMENTUM) * (math.cos(math.pi * (step + 1) / STEPS) + 1) / 2
        for slow, fast in zip(model.target.parameters(), model.online.parameters(), strict=True):
            slow.data = keep * slow.data + (1 - keep) * fast.data
