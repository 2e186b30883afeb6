"""FixMatch: labels where there are some, else the confident guess of a weak view for a strong one.

Labelled and unlabelled images are one data set, in which -1 stands for no label; an order mixes
them in each step, one to three. The means are over the labelled and the unlabelled of a step.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

CLASSES, LABELLED, SAMPLES, THRESHOLD = 3, 6, 30, 0.4
CONFIG = {
    "epochs": 3,
    "loss": {"class_path": "ports.fixmatch.Criterion"},
    "data": {
        "train": {"class_path": "ports.fixmatch.images"},
        "eval": None,
        "order": {"class_path": "ports.fixmatch.order", "call": False},
        "input": [0, 1],
        "target": 2,
        "batch_size": 8,
    },
    "optim": {"lr": 0.03, "reference_batch": 8, "momentum": 0.9, "nesterov": True},
    "schedule": {"curve": {"class_path": "ports.fixmatch.fall", "call": False}},
}


def fall(step, steps_per_epoch, total_steps):
    """Fall along 7/16 of a cosine's half period, as FixMatch has it."""
    return np.cos(7 * np.pi * step / (16 * total_steps))


def images():
    """Make a weak and a strong view of each image; the first few have labels."""
    drawn = torch.Generator().manual_seed(0)
    weak = torch.randn(SAMPLES, 8, generator=drawn)
    strong = weak + 0.3 * torch.randn(SAMPLES, 8, generator=drawn)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=drawn)
    labels[LABELLED:] = -1
    return TensorDataset(weak, strong, labels)


def order(samples, seed, epoch, global_batch):
    """Read the unlabelled images once, and labelled ones as often as needed."""
    drawn = np.random.default_rng([seed, epoch])
    unlabelled = LABELLED + drawn.permutation(samples - LABELLED)
    labelled = drawn.integers(LABELLED, size=len(unlabelled) // 3)
    return np.concatenate([labelled[:, None], unlabelled.reshape(-1, 3)], axis=1).ravel()


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.scores = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, CLASSES))

    def forward(self, weak, strong):
        return self.scores(weak), self.scores(strong)


class Criterion:
    def __call__(self, outputs, labels):
        (weak, strong), known = outputs, labels >= 0
        confidence, guess = weak[~known].detach().softmax(1).max(1)
        each = functional.cross_entropy(strong[~known], guess, reduction="none")
        return {
            "labelled": functional.cross_entropy(weak[known], labels[known]),
            "unlabelled": (each * (confidence >= THRESHOLD)).mean(),
        }

    def units(self, labels):
        return {"labelled": (labels >= 0).sum(), "unlabelled": (labels < 0).sum()}


build_model = Classifier


def by_hand(model, epochs):
    """Train as the script does."""
    criterion = Criterion()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    steps = [batch for epoch in epochs for batch in epoch]
    for step, (weak, strong, labels) in enumerate(steps):
        optimizer.param_groups[0]["lr"] = 0.03 * np.cos(7 * np.pi * step / (16 * len(steps)))
        optimizer.zero_grad()
        losses = criterion(model(weak, strong), labels)
        (losses["labelled"] + losses["unlabelled"]).backward()
        optimizer.step()
