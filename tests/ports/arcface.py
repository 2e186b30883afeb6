"""ArcFace: an angular margin on the true class; batches of P identities with K images each.

The margin needs the label, so the model gets it beside the image. Some identities have more images
than others: an epoch reads some images twice, others not at all.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

IDENTITIES, SAMPLES, PER_IDENTITY, MARGIN, SCALE = 9, 26, 2, 0.5, 16.0
CONFIG = {
    "epochs": 3,
    "loss": {"class_path": "torch.nn.CrossEntropyLoss"},
    "data": {
        "train": {"class_path": "ports.arcface.faces"},
        "eval": None,
        "order": {"class_path": "ports.arcface.order", "call": False},
        "input": [0, 1],
        "target": 1,
        "batch_size": 8,
    },
    "optim": {"lr": 0.1, "reference_batch": 8, "momentum": 0.9, "weight_decay": 5e-4},
    "schedule": {"name": "step", "milestones": [2.0]},
}


def labels():
    """Give the identity of each image."""
    return torch.arange(SAMPLES) // 3


def faces():
    """Make images with their identities."""
    images = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, labels())


def order(samples, seed, epoch, global_batch):
    """Draw images of some identities for each step."""
    drawn = np.random.default_rng([seed, epoch])
    images = [np.flatnonzero(labels() == each) for each in labels().unique()]
    steps = []
    for _ in range(samples // global_batch):
        chosen = drawn.choice(len(images), global_batch // PER_IDENTITY, replace=False)
        steps += [drawn.choice(images[each], PER_IDENTITY) for each in chosen]
    return np.concatenate(steps)


class ArcFace(nn.Module):
    """Features, and their angles to the centre of each identity."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(8, 16), nn.PReLU(), nn.Linear(16, 6))
        self.centers = nn.Parameter(torch.randn(IDENTITIES, 6))

    def forward(self, images, labels):
        """Return the scores, with the margin on the true identity."""
        features = functional.normalize(self.features(images))
        cosines = features @ functional.normalize(self.centers).T
        angles = cosines.clamp(-1 + 1e-7, 1 - 1e-7).acos()
        true = functional.one_hot(labels, IDENTITIES)
        return SCALE * (angles + MARGIN * true).cos()


build_model = ArcFace


def by_hand(model, epochs):
    """Train as the script does; the slope of PReLU does not decay."""
    wide = [p for p in model.parameters() if p.ndim > 1]
    narrow = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    groups = [{"params": wide}, narrow]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2])
    for epoch in epochs:
        for images, identities in epoch:
            optimizer.zero_grad()
            scores = model(images, identities)
            functional.cross_entropy(scores, identities).backward()
            optimizer.step()
        scheduler.step()
