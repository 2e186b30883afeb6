"""Detection: a model of torchvision, which computes its own losses in training.

RetinaNet takes the mean of its losses over images, so that they can be split. In evaluation it
gives boxes and no loss, hence no held-out set.
"""

import torch
from torch import nn
from torch.utils.data import Dataset
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

CONFIG = {
    "epochs": 3,
    "loss": None,
    "data": {
        "train": {"class_path": "ports.detection.Scenes"},
        "eval": None,
        "collate": {"class_path": "ports.detection.as_lists", "call": False},
        "batch_size": 8,
    },
    "optim": {"lr": 0.02, "reference_batch": 8, "momentum": 0.9, "clip_value": 0.5},
    "schedule": {"name": "step", "milestones": [2.0], "warmup_steps": 2, "warmup_start": 0.1},
}


class Scenes(Dataset):
    """Images with one to three boxes each."""

    def __len__(self):
        return 14

    def __getitem__(self, index):
        drawn = torch.Generator().manual_seed(index)
        corners = torch.randint(0, 16, (1 + index % 3, 2), generator=drawn)
        sizes = torch.randint(8, 16, (1 + index % 3, 2), generator=drawn)
        boxes = torch.cat([corners, corners + sizes], dim=1).to(torch.get_default_dtype())
        classes = torch.randint(2, (len(boxes),), generator=drawn)
        image = torch.rand(3, 32, 32, generator=drawn)
        return image, {"boxes": boxes, "labels": classes}


def as_lists(samples):
    """Collate lists of images and of targets, as detection models take them."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def build_model():
    """Build a RetinaNet with a small backbone and few anchors."""
    backbone = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU()),
    )
    backbone.out_channels = 8
    anchors = AnchorGenerator(sizes=((8, 16),), aspect_ratios=((1.0,),))
    head = {"anchor_generator": anchors, "min_size": 32, "max_size": 32}
    return RetinaNet(backbone, num_classes=2, **head)


def by_hand(model, epochs):
    """Train as the script does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    steps = [(number, batch) for number, epoch in enumerate(epochs) for batch in epoch]
    for step, (epoch, (images, targets)) in enumerate(steps):
        rise = min(1.0, 0.1 + 0.9 * step / 2)
        optimizer.param_groups[0]["lr"] = 0.02 * rise * (0.1 if epoch >= 2 else 1.0)
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.5)
        optimizer.step()
