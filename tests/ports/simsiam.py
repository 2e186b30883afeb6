"""SimSiam: each view predicts the other one, whose branch gets no gradient.

A sample is two views and no label. The predictor keeps its rate, as in the script, which here means
that the whole rate is constant. BatchNorm of the heads is left out.
"""

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

CONFIG = {
    "epochs": 3,
    "loss": {"class_path": "ports.simsiam.criterion", "call": False},
    "data": {
        "train": {"class_path": "ports.simsiam.TwoViews", "init_args": {"samples": 21}},
        "eval": {"class_path": "ports.simsiam.TwoViews", "init_args": {"samples": 6}},
        "input": ["first", "second"],
        "batch_size": 8,
    },
    "optim": {"lr": 0.05, "reference_batch": 8, "momentum": 0.9, "weight_decay": 1e-4},
    "schedule": {"name": "constant"},
}


class TwoViews(Dataset):
    """Two noisy views of each image, by name, with what is not used."""

    def __init__(self, samples):
        drawn = torch.Generator().manual_seed(samples)
        self.images = torch.randn(samples, 1, 6, generator=drawn)
        self.views = self.images + 0.1 * torch.randn(samples, 2, 6, generator=drawn)

    def __len__(self):
        return len(self.views)

    def __getitem__(self, index):
        first, second = self.views[index]
        return {"first": first, "second": second, "path": f"{index}.png"}


class SimSiam(nn.Module):
    """Encoder and predictor."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.predictor = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))

    def forward(self, first, second):
        """Return the predictions and the projections of both views."""
        projections = self.encoder(first), self.encoder(second)
        return *map(self.predictor, projections), *(each.detach() for each in projections)


def criterion(outputs):
    """Compute the negative similarity of each prediction to the other view."""
    first, second, of_first, of_second = outputs
    similar = functional.cosine_similarity
    return -(similar(first, of_second).mean() + similar(second, of_first).mean()) / 2


build_model = SimSiam


def by_hand(model, epochs):
    """Train as the script does."""
    options = {"lr": 0.05, "momentum": 0.9}
    kernels = [p for p in model.parameters() if p.ndim > 1]
    biases = {"params": [p for p in model.parameters() if p.ndim == 1]}
    groups = [{"params": kernels, "weight_decay": 1e-4}, biases]
    optimizer = torch.optim.SGD(groups, **options)
    for batch in (batch for epoch in epochs for batch in epoch):
        optimizer.zero_grad()
        criterion(model(batch["first"], batch["second"])).backward()
        optimizer.step()
    first, second = TwoViews(6).views.unbind(1)
    with torch.no_grad():
        return {"eval/loss": criterion(model(first, second))}
