"""Samples that form no batch are named, with a remedy; and each remedy works."""

import re
from datetime import date

import numpy as np
import pytest
import torch

from ddp_sgd.config import load_config
from ddp_sgd.config.sections import Component
from ddp_sgd.data import InMemory
from ddp_sgd.data.dataset_checks import is_pair, shape_of
from ddp_sgd.data.fetcher import Fetcher, Request, Unreadable
from ddp_sgd.data.selection import Selection
from ddp_sgd.instantiate import instantiate


class Samples:
    """Gives for an index what a function makes of it."""

    def __init__(self, give):
        self.give = give

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.give(index)


def fetch(dataset, indices=(2, 3), collate=None, selection=None):
    fetcher = Fetcher(dataset, "data.train", 0, collate, selection)
    return fetcher.__getitems__(Request(0, np.array(indices)))


def fault_of(dataset, indices=(2, 3)):
    fault = fetch(dataset, indices)
    assert isinstance(fault, Unreadable)
    assert "\n" not in fault.message
    return fault.message


def as_lists(samples):
    return samples, None


@pytest.mark.parametrize(
    ("give", "what", "chosen"),
    [
        (lambda i: (i, "text", -i), "a tuple of 3", ([2, 3], [-2, -3])),
        (lambda i: [i, "text", None, -i], "a list of 4", ([2, 3], [-2, -3])),
        (lambda i: {"x": i, "y": -i}, "a mapping with x, y", ([2, 3], [-2, -3])),
        (lambda i: {"x": i, "id": None, "y": -i}, "a mapping with x, id, y", ([2, 3], [-2, -3])),
    ],
)
def test_parts_are_chosen_as_the_message_says(give, what, chosen):
    message = fault_of(Samples(give))
    assert message.startswith(f"data.train[2] is {what}, not (input, target); return a pair, ")
    choices = re.search(
        r"(--data.input=\S+) (--data.target=\S+), or name a function from samples to a batch by "
        r"data.collate\.$",
        message,
    )
    data = load_config(choices.groups(), environ={}).data
    batch = fetch(Samples(give), selection=Selection(data.input, data.target))
    assert [part.tolist() for part in batch] == list(chosen)
    assert fetch(Samples(give), collate=as_lists) == ([give(2), give(3)], None)


@pytest.mark.parametrize(
    ("sample", "what"),
    [
        (7, "a int"),
        (None, "None"),
        ((1,), "a tuple of 1"),
        ({}, "a mapping with no keys"),
        ({"x": 1}, "a mapping with x"),
        (torch.zeros(2), "a Tensor"),
    ],
)
def test_where_columns_have_nothing_to_choose_a_pair_or_a_function_helps(sample, what):
    assert fault_of(Samples(lambda i: sample)) == (
        f"data.train[2] is {what}, not (input, target); return a pair, or name a function from "
        "samples to a batch by data.collate."
    )
    assert fetch(Samples(lambda i: sample), collate=as_lists)[0][0] is sample


HELPS = "or name a function from samples to a batch by data.collate."


@pytest.mark.parametrize(
    ("give", "start"),
    [
        (lambda i: (0.0, None), "the target of data.train[2] is None, which forms no batch; "),
        (lambda i: (0.0, None if i == 3 else 1), "the target of data.train[3] is None, which"),
        (lambda i: (None, 1), "the input of data.train[2] is None, which"),
        (
            lambda i: (0.0, {"box": [1, None]}),
            "the target['box'][1] of data.train[2] is None, which forms no batch; return a tensor "
            "or a number, ",
        ),
        (
            lambda i: (date(2026, 1, 1), 0),
            "the input of data.train[2] is a date, which forms no batch; return a tensor, an array "
            "or a number, ",
        ),
        (
            lambda i: (np.array(["a", "b"]), 0),
            "the input of data.train[2] is an array of type <U1, which no tensor holds; convert "
            "numbers by .astype(numpy.float32), encode text as numbers, ",
        ),
        (
            lambda i: (0.0, np.array([1, 2], object)),
            "the target of data.train[2] is an array of type object, which no tensor holds; ",
        ),
        (
            lambda i: (np.zeros(2, np.longdouble), 0),
            "the input of data.train[2] is an array of type float128 that becomes no tensor, "
            "TypeError: ",
        ),
        (
            lambda i: (np.zeros(2)[::-1], 0),
            "the input of data.train[2] is an array of type float64 that becomes no tensor, "
            "ValueError: ",
        ),
        (
            lambda i: (np.datetime64("2026-01-01"), 0),
            "the input of data.train[2] is an array of type datetime64[D] that becomes no tensor, ",
        ),
        (
            lambda i: (torch.zeros(i), 0),
            "the input of data.train[2] has the shape (2,) and that of data.train[3] the shape "
            "(3,), which form no batch; give all samples the same shapes and keys, such as by "
            "padding, ",
        ),
        (
            lambda i: (0, {"boxes": np.zeros((i, 4))}),
            "the target['boxes'] of data.train[2] has the shape (2, 4) and that of data.train[3] "
            "the shape (3, 4), which",
        ),
        (
            lambda i: (0, [1] * i),
            "the target of data.train[2] has 2 items and that of data.train[3] 3 items, which",
        ),
        (
            lambda i: (0, {"a": 1} if i == 2 else {"b": 1}),
            "the target of data.train[2] has the keys a and that of data.train[3] the keys b, ",
        ),
        (
            lambda i: (0, torch.zeros(1) if i == 2 else 1),
            "the target of data.train[2] has the shape (1,) and that of data.train[3] the type int",
        ),
    ],
)
def test_what_forms_no_batch_is_named_and_a_function_helps(give, start):
    message = fault_of(Samples(give))
    assert message.startswith(start)
    assert message.endswith(HELPS)
    samples, nothing = fetch(Samples(give), collate=as_lists)
    assert (len(samples), nothing) == (2, None)


@pytest.mark.parametrize(
    ("give", "remedy"),
    [
        (lambda i: (0.0, None), lambda x, y: (x, -1)),
        (lambda i: (np.array([1, 2], object), 0), lambda x, y: (x.astype(np.float32), y)),
        (lambda i: (np.array(["1", "2"]), 0), lambda x, y: (x.astype(np.float32), y)),
        (lambda i: (np.array(["a", "b"]), 0), lambda x, y: (np.array([ord(c) for c in x]), y)),
        (
            lambda i: (np.zeros(2)[::-1], 0),
            lambda x, y: (np.ascontiguousarray(x, np.float32), y),
        ),
        (
            lambda i: (np.zeros(2, np.longdouble), 0),
            lambda x, y: (np.ascontiguousarray(x, np.float32), y),
        ),
        (lambda i: (date(2026, 1, 1 + i), 0), lambda x, y: (x.day, y)),
        (
            lambda i: (torch.zeros(i), 0),
            lambda x, y: (torch.nn.functional.pad(x, (0, 8 - len(x))), y),
        ),
    ],
)
def test_what_the_message_says_to_return_forms_a_batch(give, remedy):
    fault_of(Samples(give))
    inputs, targets = fetch(Samples(lambda i: remedy(*give(i))))
    assert len(inputs) == len(targets) == 2


def test_what_is_not_understood_is_reported_by_torch():
    message = fault_of(Samples(lambda i: (torch.zeros(2, device="meta" if i == 3 else "cpu"), 0)))
    assert message.startswith(
        "data.train gave samples that do not form a batch (from index 2 on), RuntimeError: "
    )
    assert message.endswith(HELPS)


@pytest.mark.parametrize(
    ("targets", "remedy"),
    [
        (np.array(["1", "2", "3"]), lambda y: y.astype(np.float32)),
        (np.array([1, 2, 3], object), lambda y: y.astype(np.float32)),
    ],
)
def test_arrays_in_memory_that_no_tensor_holds_are_named(targets, remedy):
    inputs = np.zeros((3, 2), np.float32)
    message = fault_of(InMemory(inputs, targets), [0, 1])
    assert message == (
        f"data.train gives an array of type {targets.dtype}, which no tensor holds; convert "
        f"numbers by .astype(numpy.float32), encode text as numbers, {HELPS}"
    )
    assert fetch(InMemory(inputs, remedy(targets)), [0, 1])[1].tolist() == [1, 2]
    samples, _ = fetch(InMemory(inputs, targets), [0, 1], collate=as_lists)
    assert [int(target) for _, target in samples] == [1, 2]


class Pictures:
    """Images and masks of PIL, as torchvision's data sets give them."""

    def __init__(self, transform=None, target_transform=None):
        self.transforms = transform, target_transform

    def __len__(self):
        return 8

    def __getitem__(self, index):
        from PIL import Image

        picture = Image.fromarray(np.full((4, 4), index, np.uint8))
        transform, target_transform = self.transforms
        return (
            transform(picture) if transform else picture,
            target_transform(picture) if target_transform else picture,
        )


def test_pictures_are_converted_as_the_message_says():
    pytest.importorskip("torchvision")
    options, dataset, messages = [], Pictures(), []
    for _ in range(2):  # the input first, then the target
        messages.append(fault_of(dataset))
        options += re.findall(r"--data.train.init_args\S+", messages[-1])
        path = "ddp_sgd.data.Columns"
        config = load_config(
            [f"--data.train.class_path={path}", "--data.train.init_args={}", *options]
        )
        named = config.data.train.init_args
        transforms = {key: instantiate(Component(**each), key) for key, each in named.items()}
        dataset = Pictures(**transforms)
    assert messages[0].startswith(
        "the input of data.train[2] is a PIL image, which forms no batch;"
    )
    assert messages[1].startswith(
        "the target of data.train[2] is a PIL image, which forms no batch;"
    )
    inputs, targets = fetch(dataset)
    assert (inputs.dtype, targets.dtype) == (torch.float32, torch.uint8)
    assert inputs.shape == targets.shape == (2, 1, 4, 4)
    assert fetch(Pictures(), collate=as_lists)[0][1][0].size == (4, 4)


@pytest.mark.parametrize(
    ("value", "is_one"),
    [((1, 2), True), ([1, 2], True), ((1, 2, 3), False), ({1: 1, 2: 2}, False), ("ab", False)],
)
def test_is_pair(value, is_one):
    assert is_pair(value) is is_one


def test_shape_of():
    assert shape_of({"a": 1, 2: 3}) == "a mapping with a, 2"
