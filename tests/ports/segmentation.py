"""Segmentation with an auxiliary head, as in torchvision's reference script.

Pixels of the border have the target 255 and do not count. The mean is over the pixels that do, of
all ranks, so the loss says how many they are.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

IGNORED, CLASSES = 255, 3
CONFIG = {
    "epochs": 3,
    "loss": {"class_path": "ports.segmentation.Criterion"},
    "data": {
        "train": {"class_path": "ports.segmentation.scenes", "init_args": {"samples": 20}},
        "eval": {"class_path": "ports.segmentation.scenes", "init_args": {"samples": 5}},
        "batch_size": 8,
    },
    "optim": {"lr": 0.02, "reference_batch": 8, "momentum": 0.9, "weight_decay": 1e-4},
    "schedule": {"name": "polynomial", "power": 0.9},
}


class Segmenter(nn.Module):
    """A backbone with two heads."""

    def __init__(self):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.head, self.auxiliary = nn.Conv2d(6, CLASSES, 1), nn.Conv2d(6, CLASSES, 1)

    def forward(self, images):
        """Return the scores of each pixel by both heads."""
        features = self.early(images)
        return {"out": self.head(self.late(features)), "aux": self.auxiliary(features)}


class Criterion:
    """Cross entropy of both heads, the auxiliary one with half the weight."""

    def __call__(self, outputs, masks):
        """Compute the loss and its parts, means over the pixels that count."""
        losses = {
            name: functional.cross_entropy(scores, masks, ignore_index=IGNORED)
            for name, scores in outputs.items()
        }
        return {"loss": losses["out"] + 0.5 * losses["aux"], **losses}

    def units(self, masks):
        """Count these pixels."""
        return (masks != IGNORED).sum()


def scenes(samples):
    """Make images with masks, whose borders differ in width."""
    drawn = torch.Generator().manual_seed(samples)
    masks = torch.randint(CLASSES, (samples, 8, 8), generator=drawn)
    for number, mask in enumerate(masks):
        mask[: number % 4] = IGNORED
    return TensorDataset(torch.randn(samples, 3, 8, 8, generator=drawn), masks)


def build_model():
    """Build a small network."""
    return Segmenter()


def by_hand(model, epochs):
    """Train as the script does, and score the held-out images."""
    criterion, total = Criterion(), sum(map(len, epochs))
    options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4}
    kernels = [p for p in model.parameters() if p.ndim > 1]
    biases = {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.SGD([{"params": kernels}, biases], **options)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total, power=0.9)
    for images, masks in (batch for epoch in epochs for batch in epoch):
        optimizer.zero_grad()
        criterion(model(images), masks)["loss"].backward()
        optimizer.step()
        scheduler.step()
    images, masks = scenes(5).tensors
    with torch.no_grad():
        losses = criterion(model(images), masks)
    return {f"eval/{name}": loss for name, loss in losses.items()}
