"""Data sets of random samples, and functions that form batches of them."""

import h5py
import numpy as np
import torch
from models.networks import CLASSES, WIDTH

SAMPLES = 7
"""Not a multiple of ranks or micro-batches: some have fewer samples than others."""
EVEN = 8
"""For batch normalization, which needs two samples in every micro-batch."""


class Listed:
    """Samples in a list.

    Args:
        samples: The samples.
    """

    def __init__(self, samples):
        self.samples = list(samples)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Draw:
    """Draws the parts of samples, the same at every call."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)

    def numbers(self, *shape, dtype=torch.float64):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def whole(self, high, *shape, low=0):
        return torch.randint(low, high, shape, generator=self.generator)


def made_by(make, samples=SAMPLES):
    """Make a function that builds a data set, of what another one draws for each sample."""

    def build():
        draw = Draw()
        return Listed([make(draw, number) for number in range(samples)])

    return build


def label(number):
    return number % CLASSES


def rows(samples=SAMPLES, dtype=torch.float64):
    return made_by(lambda draw, n: (draw.numbers(WIDTH, dtype=dtype), label(n)), samples)


def images(samples=SAMPLES, size=8, dtype=torch.float64, channels=1):
    return made_by(
        lambda draw, n: (draw.numbers(channels, size, size, dtype=dtype), label(n)), samples
    )


def sequences(samples=SAMPLES):
    return made_by(lambda draw, n: (draw.numbers(4, WIDTH), label(n)), samples)


def sentences():
    """Sequences of different lengths."""
    return made_by(lambda draw, n: (draw.numbers(1 + n % 3, WIDTH), label(n)))()


def growing():
    """Sequences of which each is longer than the one before, so that no two ranks see the same."""
    return made_by(lambda draw, n: (draw.numbers(1 + n, WIDTH), label(n)), EVEN)()


def masks():
    """Images and the class of each pixel; more pixels are unknown in some than in others."""

    def make(draw, number):
        classes = draw.whole(CLASSES, 8, 8)
        classes.view(-1)[: 9 * number] = 255
        return draw.numbers(1, 8, 8), classes

    return made_by(make)()


def full_masks():
    return made_by(lambda draw, n: (draw.numbers(1, 8, 8), draw.whole(CLASSES, 8, 8)))()


def tags():
    """Several labels for each sample."""
    return made_by(lambda draw, n: (draw.numbers(WIDTH), draw.whole(2, CLASSES).double()))()


def shares():
    """Probabilities of classes."""
    return made_by(lambda draw, n: (draw.numbers(WIDTH), draw.numbers(CLASSES).softmax(dim=0)))()


def numbers(*shape):
    """A regression."""
    return made_by(lambda draw, n: (draw.numbers(WIDTH), draw.numbers(*shape)))


def copies():
    """Targets that are the inputs."""
    return made_by(lambda draw, n: (row := draw.numbers(WIDTH), row))()


def texts():
    """Ids of words, of one length."""
    return made_by(lambda draw, n: (draw.whole(10, 5), int(draw.whole(10))))()


def spoken():
    """Frames and the symbols in them, fewer in some than in others."""
    return made_by(lambda draw, n: (draw.numbers(6, WIDTH), draw.whole(5, 1 + n % 3, low=1)))()


def tokens(with_labels=False):
    """What a tokenizer gives, padded to one length; perhaps with the labels."""

    def make(draw, number):
        length = 3 + number % 3
        fields = {
            "input_ids": torch.cat([draw.whole(10, length, low=1), torch.zeros(5 - length).long()]),
            "attention_mask": (torch.arange(5) < length).long(),
        }
        if with_labels:
            fields["labels"] = torch.tensor(label(number))
        return fields, label(number)

    return made_by(make)()


def pairs():
    return made_by(
        lambda draw, n: ((draw.numbers(WIDTH), draw.numbers(WIDTH)), draw.numbers().square())
    )()


def mappings():
    return made_by(
        lambda draw, n: ({"left": draw.numbers(WIDTH), "right": draw.numbers(WIDTH)}, label(n))
    )()


def labelled_pairs():
    """Inputs that contain the label."""
    return made_by(lambda draw, n: ((draw.numbers(WIDTH), torch.tensor(label(n))), label(n)))()


class Stored:
    """Samples in an HDF5 file, opened at the first read of each process.

    Args:
        path: The file; written by ``store``.
    """

    def __init__(self, path):
        self.path = path
        self.file = None
        with h5py.File(path) as file:
            self.length = len(file["targets"])

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices):
        if self.file is None:
            self.file = h5py.File(self.path)
        order = np.argsort(indices)  # h5py takes ascending indices only
        back = np.argsort(order)
        chosen = np.asarray(indices)[order]
        return self.file["inputs"][chosen][back], self.file["targets"][chosen][back]


def store(path):
    """Write the samples of ``rows`` into an HDF5 file."""
    inputs, targets = zip(*rows()().samples, strict=True)
    with h5py.File(path, "w") as file:
        file["inputs"] = torch.stack(inputs).numpy()
        file["targets"] = np.array(targets)


class Flatten:
    """Frames, and the symbols of all samples in one tensor with their numbers."""

    def __call__(self, samples):
        frames, symbols = zip(*samples, strict=True)
        lengths = torch.tensor([len(each) for each in symbols])
        return torch.stack(frames), (torch.cat(symbols), lengths)


class Pack:
    """Sequences of different lengths as one packed sequence."""

    def __call__(self, samples):
        inputs, labels = zip(*samples, strict=True)
        packed = torch.nn.utils.rnn.pack_sequence(inputs, enforce_sorted=False)
        return packed, torch.tensor(labels)


class AsList:
    """Inputs as a list of one tensor per sample."""

    def __call__(self, samples):
        inputs, labels = zip(*samples, strict=True)
        return list(inputs), torch.tensor(labels)
