"""Distillation: a student learns labels, and the softened scores of a frozen teacher.

The two terms are logged beside the loss that is trained, which weighs them. The teacher is a part
of the model that is not trained.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

TEMPERATURE, SHARE = 4.0, 0.7
CONFIG = {
    "epochs": 3,
    "loss": {"class_path": "ports.distillation.criterion", "call": False},
    "data": {
        "train": {"class_path": "ports.distillation.points", "init_args": {"samples": 30}},
        "eval": {"class_path": "ports.distillation.points", "init_args": {"samples": 11}},
        "batch_size": 12,
    },
    "optim": {"lr": 0.05, "reference_batch": 12, "momentum": 0.9, "nesterov": True},
    "schedule": {"name": "step", "milestones": [1.0, 2.0], "gamma": 0.2},
}


class Distilled(nn.Module):
    """A student beside its teacher."""

    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5))
        self.teacher = nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 5))
        self.teacher.requires_grad_(False)

    def forward(self, inputs):
        """Return the scores of both."""
        return self.student(inputs), self.teacher(inputs)


def criterion(outputs, labels):
    """Weigh the loss of the labels and that of the teacher's scores."""
    student, teacher = outputs
    soft = functional.kl_div(
        functional.log_softmax(student / TEMPERATURE, dim=1),
        functional.softmax(teacher / TEMPERATURE, dim=1),
        reduction="batchmean",
    )
    hard = functional.cross_entropy(student, labels)
    loss = SHARE * TEMPERATURE**2 * soft + (1 - SHARE) * hard
    return {"loss": loss, "soft": soft, "hard": hard}


def points(samples):
    """Make points with their classes."""
    drawn = torch.Generator().manual_seed(samples)
    labels = torch.randint(5, (samples,), generator=drawn)
    return TensorDataset(torch.randn(samples, 6, generator=drawn), labels)


def build_model():
    """Build both networks."""
    return Distilled()


def by_hand(model, epochs):
    """Train the student, and score it on the held-out points."""
    parameters = model.student.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.2)
    for epoch in epochs:
        for inputs, labels in epoch:
            optimizer.zero_grad()
            criterion(model(inputs), labels)["loss"].backward()
            optimizer.step()
        scheduler.step()
    inputs, labels = points(11).tensors
    with torch.no_grad():
        losses = criterion(model(inputs), labels)
    return {f"eval/{name}": loss for name, loss in losses.items()}
