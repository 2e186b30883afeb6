"""Speech recognition: CTC over utterances of different lengths, a mean over their symbols.

Utterances of like length make a step (buckets); the steps of an epoch are shuffled.
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

SYMBOLS, FEATURES = 5, 4
CONFIG = {
    "epochs": 3,
    "loss": {"class_path": "ports.speech.Criterion"},
    "data": {
        "train": {"class_path": "ports.speech.Utterances", "init_args": {"samples": 20}},
        "eval": {"class_path": "ports.speech.Utterances", "init_args": {"samples": 7}},
        "collate": {"class_path": "ports.speech.pad", "call": False},
        "order": {"class_path": "ports.speech.buckets", "call": False},
        "batch_size": 8,
    },
    "optim": {"lr": 0.05, "reference_batch": 8, "momentum": 0.9, "clip_norm": 5.0},
    "schedule": {"name": "linear"},
}


class Utterances(Dataset):
    def __init__(self, samples):
        self.lengths = [10 + 3 * index % 17 for index in range(samples)]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, index):
        drawn = torch.Generator().manual_seed(index)
        frames = torch.randn(self.lengths[index], FEATURES, generator=drawn)
        return frames, torch.randint(1, SYMBOLS, (2 + index % 3,), generator=drawn)


def pad(samples):
    """Collate padded frames with their lengths, and padded symbols with theirs."""
    parts = zip(*samples, strict=True)
    return tuple((pad_sequence(p, batch_first=True), torch.tensor([*map(len, p)])) for p in parts)


def buckets(samples, seed, epoch, global_batch):
    """Order utterances by length, cut that into steps and shuffle those; a smaller one is last."""
    order = np.argsort(Utterances(samples).lengths, kind="stable")
    whole = samples // global_batch * global_batch
    steps = order[:whole].reshape(-1, global_batch)
    np.random.default_rng([seed, epoch]).shuffle(steps)
    return np.concatenate([steps.ravel(), order[whole:]])


class Recognizer(nn.Module):  # reads forward, so padding changes nothing
    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(FEATURES, 6, batch_first=True)
        self.scores = nn.Linear(6, SYMBOLS)

    def forward(self, frames, lengths):
        return self.scores(self.recurrent(frames)[0]).log_softmax(-1).transpose(0, 1), lengths


class Criterion:
    def __call__(self, outputs, targets):
        (scores, frames), (symbols, lengths) = outputs, targets
        loss = functional.ctc_loss(scores, symbols, frames, lengths, reduction="sum")
        return loss / lengths.sum()

    def units(self, targets):
        return targets[1].sum()


build_model = Recognizer


def by_hand(model, epochs):
    """Train as the script does, and score the held-out utterances."""
    criterion, steps = Criterion(), [batch for epoch in epochs for batch in epoch]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(steps))
    for (frames, lengths), targets in steps:
        optimizer.zero_grad()
        criterion(model(frames, lengths), targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        scheduler.step()
    (frames, lengths), targets = pad([*Utterances(7)])
    with torch.no_grad():
        return {"eval/loss": criterion(model(frames, lengths), targets)}
