"""Momentum contrast: queries of one view are told from a queue of keys of other images.

After a step, the encoder of the keys follows, and the keys of all ranks enter the queue. BatchNorm,
which the script shuffles over ranks, is left out.
"""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

QUEUE, MOMENTUM, TEMPERATURE, WIDTH = 24, 0.9, 0.2, 5
CONFIG = {
    "epochs": 3,
    "loss": {"class_path": "ports.moco.criterion", "call": False},
    "data": {
        "train": {"class_path": "ports.moco.TwoViews"},
        "eval": None,
        "input": [0, 1],
        "batch_size": 8,
        "tail": "drop",
    },
    "optim": {"lr": 0.03, "reference_batch": 8, "weight_decay": 1e-4, "decay_norm_and_bias": True},
}


class TwoViews(Dataset):
    """Two noisy views of each image, others in each epoch."""

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 19

    def __getitem__(self, index):
        image = torch.randn(6, generator=torch.Generator().manual_seed(index))
        drawn = torch.Generator().manual_seed(1000 * self.epoch + index)
        return tuple(image + 0.1 * torch.randn(2, 6, generator=drawn))


class MoCo(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, WIDTH))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", functional.normalize(torch.randn(QUEUE, WIDTH)))
        self.register_buffer("new", torch.zeros(0, WIDTH))

    def forward(self, first, second):
        query = functional.normalize(self.query(first))
        key = functional.normalize(self.key(second))
        self.new = torch.cat([self.new, key])
        positive = (query * key).sum(1, keepdim=True)
        return torch.cat([positive, query @ self.queue.T], dim=1) / TEMPERATURE

    def after_step(self, step):
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            key.lerp_(query, 1 - MOMENTUM)
        keys = [self.new]
        if dist.is_initialized():
            keys = [torch.empty_like(self.new) for _ in range(dist.get_world_size())]
            dist.all_gather(keys, self.new)
        self.queue = torch.cat([self.queue, *keys])[-QUEUE:]
        self.new = self.new[:0]


def criterion(similarities):
    """Compute the loss: the key of each query is the first."""
    return -similarities.log_softmax(1)[:, 0].mean()


build_model = MoCo


def by_hand(model, epochs):
    """Train as the script does."""
    parameters = model.query.parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, sum(map(len, epochs)))
    for first, second in (batch for epoch in epochs for batch in epoch):
        with torch.no_grad():
            key = functional.normalize(model.key(second))
        query = functional.normalize(model.query(first))
        similarities = torch.cat([(query * key).sum(1)[:, None], query @ model.queue.T], dim=1)
        loss = functional.cross_entropy(similarities / TEMPERATURE, torch.zeros(8).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        for slow, fast in zip(model.key.parameters(), model.query.parameters(), strict=True):
            slow.data.mul_(MOMENTUM).add_(fast.data, alpha=1 - MOMENTUM)
        model.queue = torch.cat([model.queue[8:], key])
