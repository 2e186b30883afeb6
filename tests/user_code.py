"""What a user may name in a configuration, good and bad."""

import os
import time
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

NOT_CALLABLE = 3


class Shade(Enum):
    """An enum, as an argument may want one of its members."""

    DARK = 1
    LIGHT = 2


class Zeros:
    """Well-formed samples: zeros, of class 0."""

    def __init__(self, samples=8, width=4, label=0):
        self._samples = samples
        self._width = width
        self._label = label

    def __len__(self):
        return self._samples

    def __getitem__(self, index):
        return np.zeros(self._width, np.float32), self._label


class RaisesAt(Zeros):
    def __init__(self, at, samples=8):
        super().__init__(samples)
        self._at = at

    def __getitem__(self, index):
        if index == self._at:
            raise OSError("the disk\nis gone")
        return super().__getitem__(index)


class FailsOnRank(Zeros):
    """Samples that one rank cannot read, but for the first two, which are tried before the run."""

    def __init__(self, rank, samples=64):
        super().__init__(samples)
        self._rank = rank

    def __getitem__(self, index):
        if index > 1 and os.environ.get("RANK") == str(self._rank):
            raise OSError("the disk is gone")
        return super().__getitem__(index)


class LateLabel(Zeros):
    """One label out of range, where no list of labels gives it away before the run."""

    def __getitem__(self, index):
        return np.zeros(self._width, np.float32), 99 if index == 6 else 0


class Ragged(Zeros):
    def __getitem__(self, index):
        return np.zeros(self._width + index, np.float32), 0


class Mappings(Zeros):
    def __getitem__(self, index):
        return {"pixels": np.zeros(self._width, np.float32), "digit": 0}


class Triples(Zeros):
    def __getitem__(self, index):
        return np.zeros(self._width, np.float32), 0, index


class EvenBatches(Zeros):
    def __getitems__(self, indices):
        if len(indices) % 2:
            raise ValueError("an odd number of samples")
        return np.zeros((len(indices), self._width), np.float32), np.zeros(len(indices), np.int64)


class FirstOnly:
    """A collate function that forgets the targets."""

    def __call__(self, samples):
        return (torch.tensor(np.stack([inputs for inputs, _ in samples])),)


class NotANumber(Zeros):
    def __getitem__(self, index):
        return np.full(self._width, np.nan, np.float32), 0


class Stream(IterableDataset):
    def __iter__(self):
        yield np.zeros(4, np.float32), 0


class StreamWithLength(Stream):
    def __len__(self):
        return 8


class Weightless(nn.Module):
    def forward(self, inputs):
        return inputs.flatten(1)[:, :10]


class FailsInTraining(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, inputs):
        if self.training:
            raise RuntimeError("no\nluck")
        return super().forward(inputs)


class FailsLater(nn.Linear):
    """A model whose forward passes fail from the tenth one in training on."""

    def __init__(self):
        super().__init__(64, 10)
        self._passes = 0

    def forward(self, inputs):
        self._passes += self.training
        if self._passes >= 10:
            raise RuntimeError("no luck")
        return super().forward(inputs)


class NeedsAToken(nn.Linear):
    """A model that is fetched with a token, which must be the right one."""

    def __init__(self, token, url="none"):
        super().__init__(64, 10)
        if token != "c4nary-0f-gold":
            raise ValueError(f"cannot fetch it with {token}")
        Path("built").touch()


class LeaksItsToken(NeedsAToken):
    """A model that shows its token in an error, from the tenth forward pass in training on."""

    def __init__(self, token):
        super().__init__(token)
        self._token, self._passes = token, 0

    def forward(self, inputs):
        self._passes += self.training
        if self._passes >= 10:
            raise RuntimeError(f"the service does not know {self._token}")
        return super().forward(inputs)


class Hungry(nn.Linear):
    """A model that needs 128 TiB from some forward pass on, in one mode; never without one."""

    def __init__(self, training=0, evaluation=0):
        super().__init__(64, 10)
        self._left = {True: training, False: evaluation}

    def forward(self, inputs):
        self._left[self.training] -= 1
        if self._left[self.training] == 0:
            torch.empty(2**45)
        return super().forward(inputs)


class TwoOutputs(nn.Linear):
    def __init__(self):
        super().__init__(64, 10)

    def forward(self, inputs):
        scores = super().forward(inputs)
        return scores, scores


class Unbuildable(nn.Module):
    def __init__(self):
        super().__init__()
        raise ValueError("width is odd")


class Plain:
    """Neither a module nor a function."""


def vector_loss():
    return _per_sample


def text_loss():
    return lambda outputs, targets: "0.5"


def linear(inputs, *, classes=10):
    """A function as a factory."""
    return nn.Linear(inputs, classes)


def by_position(first, /, second: str = "", *rest, last=None):
    """A function whose arguments go by position, by name, or both."""
    return first, second, rest, last


def _per_sample(outputs, targets):
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


class Holder:
    """Keeps what it is given, for tests of how arguments are built."""

    def __init__(self, value=None, dtype: torch.dtype | None = None, text: str = "", **others):
        self.value = value
        self.dtype = dtype
        self.text = text
        self.others = others


class Slow(nn.Linear):
    """A model that takes its time in training until a file is there: something can happen."""

    def __init__(self, pause_s=0.0, until="now"):
        super().__init__(64, 10)
        self._pause_s = pause_s
        self._until = Path(until)

    def forward(self, inputs):
        if self.training and not self._until.exists():
            time.sleep(self._pause_s)
        return super().forward(inputs)


class DiesAt(Zeros):
    """Samples of which one ends the process that reads it, without a word."""

    def __init__(self, at, signal=9, samples=640):
        super().__init__(samples)
        self._at = at
        self._signal = signal

    def __getitem__(self, index):
        if index == self._at:
            os.kill(os.getpid(), self._signal)
            time.sleep(60)
        return super().__getitem__(index)


class Sentences:
    """Sentences of different lengths, as lists of numbers, with a name; of class 0 or 1."""

    def __init__(self, samples=22):
        self._samples = samples

    def __len__(self):
        return self._samples

    def __getitem__(self, index):
        return {"ids": [1 + index % 5] * (1 + index % 3), "name": str(index), "label": index % 2}


class Pad:
    """Forms batches of such sentences, in which it leaves out a number here and there."""

    def __init__(self, length=3, share=0.2):
        self._length = length
        self._share = share

    def __call__(self, samples):
        padded = [each["ids"] + [0] * (self._length - len(each["ids"])) for each in samples]
        inputs = torch.tensor(padded, dtype=torch.float32)
        kept = torch.rand(inputs.shape) >= self._share
        return inputs * kept, torch.tensor([each.pop("label") for each in samples])


def add_noise(batch, draws):
    """A transform of inputs of three numbers."""
    return batch + 0.1 * draws.uniform(3)


def decay_by_halves(step, steps_per_epoch, total_steps):
    """A curve of the rate: half of the epoch before, and 0 at the last step of the run."""
    return 0.0 if step == total_steps - 1 else 0.5 ** (step // steps_per_epoch)


class Triangle:
    """A curve that rises to 1 and falls again, as an object that is called."""

    def __init__(self, peak_at=0.5):
        self._peak_at = peak_at

    def __call__(self, step, steps_per_epoch, total_steps):
        part = (step + 1) / (total_steps + 1)
        return min(part / self._peak_at, (1 - part) / (1 - self._peak_at))


class BadCurve:
    """A curve that is 1, but for what it gives at one step: an exception is raised."""

    def __init__(self, at=0, value=None):
        self._at = at
        self._value = value

    def __call__(self, step, steps_per_epoch, total_steps):
        if step != self._at:
            return 1.0
        if isinstance(self._value, str) and self._value.startswith("raise"):
            raise RuntimeError("no such step")
        return float(self._value[1:]) if str(self._value).startswith("=") else self._value


class Counting:
    """A curve that changes with each call."""

    def __init__(self):
        self.calls = 0

    def __call__(self, step, steps_per_epoch, total_steps):
        self.calls += 1
        return 1 / self.calls


class Terms:
    """A loss of two numbers by name, of which one is missing at some call, with units.

    Args:
        units: Units of a micro-batch, or what else ``units`` gives.
        calls: Calls with both numbers; the later ones have one.
        later: Units of a micro-batch after the first.
    """

    def __init__(self, units=1.0, calls=10**9, later=None):
        self._units = units
        self._calls = calls
        self._later = later

    def units(self, targets):
        units = self._units
        if self._later is not None and len(targets) != 8:  # those of the check before the run
            units = self._later
        return units

    def __call__(self, outputs, targets):
        self._calls -= outputs.requires_grad
        value = nn.functional.cross_entropy(outputs, targets)
        return {"fit": value, "size": value} if self._calls >= 0 else {"fit": value}


class OwnLoss(nn.Module):
    """A model that gives its loss, or scores in evaluation mode if it is told so."""

    def __init__(self, *, scores=False):
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.scores = scores

    def forward(self, inputs, targets):
        outputs = self.net(inputs)
        if self.scores and not self.training:
            return outputs
        return {
            "fit": nn.functional.cross_entropy(outputs, targets),
            "size": 1e-3 * outputs.square().mean(),
        }


class OtherOnRank:
    """A curve that one rank has otherwise, from a step on."""

    def __init__(self, rank, begin):
        self._factor = 0.5 if os.environ.get("RANK") == str(rank) else 1.0
        self._begin = begin

    def __call__(self, step, steps_per_epoch, total_steps):
        return self._factor if step >= self._begin else 1.0
