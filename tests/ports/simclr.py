"""SimCLR: each view has to find its partner among all views of the batch.

Such a loss compares the samples of a micro-batch, so that the batch is the unit: it is trained as
the script means it on one rank, without accumulation, and the run says so.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

NEEDS_THE_WHOLE_BATCH, TEMPERATURE = True, 0.5
CONFIG = {
    "epochs": 3,
    "loss": {"class_path": "ports.simclr.criterion", "call": False},
    "data": {
        "train": {"class_path": "ports.simclr.views"},
        "eval": None,
        "input": [0, 1],
        "batch_size": 8,
        "tail": "drop",
    },
    "optim": {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-6, "decay_norm_and_bias": True},
    "schedule": {"name": "cosine"},
}


class Projector(nn.Module):
    """Projections of both views."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, first, second):
        return self.projection(first), self.projection(second)


def criterion(outputs):
    """Compute the cross entropy of similarities, of which the partner's is to be the largest."""
    views = functional.normalize(torch.cat(outputs))
    similarities = (views @ views.T / TEMPERATURE).fill_diagonal_(float("-inf"))
    partners = torch.arange(len(views)).roll(len(views) // 2)
    return functional.cross_entropy(similarities, partners)


def views():
    """Make two views of each image."""
    drawn = torch.Generator().manual_seed(0)
    images = torch.randn(20, 6, generator=drawn)
    return TensorDataset(*(images + 0.1 * torch.randn(2, 20, 6, generator=drawn)))


build_model = Projector


def by_hand(model, epochs):
    """Train as the script does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-6)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sum(map(len, epochs)))
    for first, second in (batch for epoch in epochs for batch in epoch):
        optimizer.zero_grad()
        criterion(model(first, second)).backward()
        optimizer.step()
        scheduler.step()
