"""One-stage detection as YOLO has it: three losses of a grid, and momentum that warms up.

The objectness is a mean over all cells, the box and the class one over the cells that hold an
object, so each has units of its own. The rate falls in a straight line, once per epoch.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

CLASSES, GRID = 3, 4
CONFIG = {
    "epochs": 4,
    "loss": {"class_path": "ports.yolo.Criterion"},
    "data": {
        "train": {"class_path": "ports.yolo.scenes", "init_args": {"samples": 21}},
        "eval": {"class_path": "ports.yolo.scenes", "init_args": {"samples": 6}},
        "batch_size": 8,
    },
    "optim": {"lr": 0.02, "reference_batch": 8, "momentum": 0.937, "nesterov": True},
    "schedule": {
        "curve": {"class_path": "ports.yolo.fall", "call": False},
        "warmup_steps": 4,
        "warmup_start": 0.1,
        "momentum_start": 0.8,
    },
}


def fall(step, steps_per_epoch, total_steps):
    """Fall from 1 to 0.01, once per epoch."""
    return 1 - 0.99 * (step // steps_per_epoch) / (total_steps / steps_per_epoch)


class Criterion:
    """Losses of the box, the objectness and the class of each cell, whose sum is trained."""

    def __call__(self, outputs, targets):
        """Compute the three means."""
        outputs, has = outputs.movedim(1, -1), targets[:, 0] > 0
        box, kind = targets[:, 1:5].movedim(1, -1)[has], targets[:, 5][has].long()
        scores = outputs[..., 0]
        return {
            "box": 0.05
            * functional.smooth_l1_loss(outputs[has][:, 1:5], box, reduction="sum")
            / has.sum(),
            "obj": functional.binary_cross_entropy_with_logits(scores, has.to(scores)),
            "cls": 0.5 * functional.cross_entropy(outputs[has][:, 5:], kind),
        }

    def units(self, targets):
        """Count the cells that each is a mean over."""
        objects = (targets[:, 0] > 0).sum()
        return {"box": objects, "obj": targets[:, 0].numel(), "cls": objects}


def scenes(samples):
    """Make images, and for each cell: whether it has an object, its box, its class."""
    drawn = torch.Generator().manual_seed(samples)
    has = torch.rand(samples, 1, GRID, GRID, generator=drawn) < 0.06
    boxes = torch.rand(samples, 4, GRID, GRID, generator=drawn)
    classes = torch.randint(CLASSES, (samples, 1, GRID, GRID), generator=drawn)
    images = torch.randn(samples, 3, 4 * GRID, 4 * GRID, generator=drawn)
    return TensorDataset(images, torch.cat([has, boxes, classes], dim=1))


def build_model():
    """Build a small network."""
    first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.SiLU(), nn.Conv2d(8, 5 + CLASSES, 3, stride=2, padding=1))


def by_hand(model, epochs):
    """Train as the script does, and score the held-out images."""
    criterion, step = Criterion(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.937, nesterov=True)
    (group,) = optimizer.param_groups
    for epoch, batches in enumerate(epochs):
        for images, targets in batches:
            part = min(1.0, step / 4)
            group["lr"] = 0.02 * (1 - 0.99 * epoch / len(epochs)) * (0.1 + 0.9 * part)
            group["momentum"] = 0.8 + (0.937 - 0.8) * part
            optimizer.zero_grad()
            sum(criterion(model(images), targets).values()).backward()
            optimizer.step()
            step += 1
    images, targets = scenes(6).tensors
    with torch.no_grad():
        losses = criterion(model(images), targets)
    return {f"eval/{name}": loss for name, loss in losses.items()} | {
        "eval/loss": sum(losses.values())
    }
