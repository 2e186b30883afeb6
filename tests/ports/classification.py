"""Image classification, by the default recipe of torchvision's reference script.

The rate rises, then falls along a cosine, both per epoch; labels are smoothed; all parameters
decay. GroupNorm takes the place of BatchNorm, whose statistics are those of a micro-batch.
"""

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import TensorDataset

CONFIG = {
    "epochs": 5,
    "loss": {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}},
    "data": {
        "train": {"class_path": "ports.classification.images", "init_args": {"samples": 22}},
        "eval": {"class_path": "ports.classification.images", "init_args": {"samples": 9}},
        "batch_size": 8,
    },
    "optim": {
        "lr": 0.1,
        "reference_batch": 8,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "decay_norm_and_bias": True,
    },
    "schedule": {
        "name": "cosine",
        "by": "epoch",
        "warmup": "shift",
        "warmup_epochs": 2.0,
        "warmup_start": 0.01,
    },
    "log": {"train_accuracy": True},
}


def images(samples):
    """Make images of three channels, with their classes."""
    drawn = torch.Generator().manual_seed(samples)
    return TensorDataset(
        torch.randn(samples, 3, 6, 6, generator=drawn),
        torch.randint(4, (samples,), generator=drawn),
    )


def build_model():
    """Build a small network of two blocks."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.GroupNorm(2, 8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


def by_hand(model, epochs):
    """Train as the script does, and score the held-out images."""
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    warm_up = LinearLR(optimizer, start_factor=0.01, total_iters=2)
    cosine = CosineAnnealingLR(optimizer, T_max=len(epochs) - 2)
    scheduler = SequentialLR(optimizer, [warm_up, cosine], milestones=[2])
    for epoch in epochs:
        for inputs, labels in epoch:
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        scheduler.step()
    inputs, labels = images(9).tensors
    with torch.no_grad():
        scores = model(inputs)
        accuracy = (scores.argmax(1) == labels).double().mean()
        return {"eval/loss": criterion(scores, labels), "eval/accuracy": accuracy}
