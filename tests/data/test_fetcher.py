import random
import re
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import (
    ConcatDataset,
    Dataset,
    StackDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from ddp_sgd.data import Digits, InMemory
from ddp_sgd.data.fetcher import Fetcher, Request, Unreadable, aligned
from ddp_sgd.errors import DataError


class Noisy:
    """Samples that draw from every generator that an augmentation may use."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        draws = [torch.rand(()).item(), random.random(), np.random.rand()]
        return torch.tensor([float(index), *draws]), index


class Broken(Noisy):
    def __init__(self, sample):
        self.sample = sample

    def __getitem__(self, index):
        return self.sample(index)


def fetch(dataset, indices, *, epoch=0, seed=0, collate=None):
    fetcher = Fetcher(dataset, "data.train", seed, collate)
    return fetcher.__getitems__(Request(epoch, np.array(indices)))


def test_a_whole_batch_equals_its_samples():
    digits = Digits("eval")
    whole = fetch(digits, [5, 3, 200])
    one_by_one = [digits[index] for index in range(360)]
    for dataset in (one_by_one, Subset(digits, range(360))):
        inputs, targets = fetch(dataset, [5, 3, 200])
        assert torch.equal(whole[0], inputs)
        assert torch.equal(whole[1], targets)


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.arange(10.0), torch.arange(10)),
        InMemory(torch.arange(10.0), torch.arange(10)),
        InMemory(np.arange(10.0), np.arange(10)),
    ],
)
def test_memory_is_read_whole(dataset):
    inputs, targets = fetch(dataset, [3, 1])
    assert (inputs.tolist(), targets.tolist()) == ([3.0, 1.0], [3, 1])


def test_a_data_set_of_ones_own_may_give_whole_batches():
    class Whole(Noisy):
        def __getitems__(self, indices):
            return torch.tensor(indices) + torch.rand(len(indices)), torch.tensor(indices)

    first, again = fetch(Whole(), [1, 2]), fetch(Whole(), [1, 2])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], fetch(Whole(), [1, 2], epoch=1)[0])


def test_data_sets_of_others_are_asked_for_python_integers():
    class Strict(Noisy):
        def __getitems__(self, indices):
            assert type(indices) is list
            assert {type(index) for index in indices} == {int}
            return np.array(indices, dtype=np.float32), np.array(indices)

    assert fetch(Strict(), [3, 1])[1].tolist() == [3, 1]

    class Each(Noisy):
        def __getitem__(self, index):
            assert type(index) is int
            return index, index

    assert fetch(Each(), [3, 1])[1].tolist() == [3, 1]


def test_random_numbers_follow_from_seed_epoch_and_index_only():
    alone = fetch(Noisy(), [3])[0][0]
    torch.rand(1), random.random(), np.random.rand()
    in_company = fetch(Noisy(), [6, 1, 3])[0][2]
    assert torch.equal(alone, in_company)
    others = [
        fetch(Noisy(), [3], epoch=1)[0][0],
        fetch(Noisy(), [3], seed=1)[0][0],
        fetch(Noisy(), [4])[0][0],
    ]
    for other in others:
        assert (other[1:] != alone[1:]).all()  # each generator


def test_what_cannot_be_read_is_named():
    fault = fetch(Broken(lambda i: 1 / 0), [2, 3])
    assert fault == Unreadable(
        "data.train[2] cannot be read, ZeroDivisionError: division by zero; fix or remove that "
        "sample."
    )


class Listed(Dataset):
    """Samples by ``__getitems__`` alone, as a list."""

    def __len__(self):
        return 8

    def __getitems__(self, indices):
        return [(torch.rand(2) + index, index) for index in indices]


def test_a_list_of_samples_is_read_one_by_one():
    """So its random numbers depend on the index, not on the split."""

    class Both(Noisy):
        def __getitems__(self, indices):
            return [self[index] for index in indices]

    for dataset in (Both(), Listed()):
        inputs, targets = fetch(dataset, [6, 1, 3])
        assert targets.tolist() == [6, 1, 3]
        assert torch.equal(inputs[2], fetch(dataset, [3])[0][0])


@pytest.mark.parametrize(
    "dataset",
    [
        StackDataset(torch.arange(8.0), InMemory(torch.arange(8.0), torch.arange(8))),
        StackDataset(torch.arange(8.0), torch.arange(8)),
        ConcatDataset([Noisy(), Noisy()]),
        Subset(Listed(), range(8)),
    ],
)
def test_wrappers_of_torch_are_read(dataset):
    inputs, _ = fetch(dataset, [6, 1])
    assert len(inputs) == 2
    assert torch.equal(inputs[1], fetch(dataset, [1])[0][0])


class Shifted(TensorDataset):
    def __getitem__(self, index):
        return tuple(tensor + 100 for tensor in super().__getitem__(index))


class Doubled(Digits):
    def __getitem__(self, index):
        inputs, target = super().__getitem__(index)
        return 2 * inputs, target


class Jittered(Digits):
    def __getitems__(self, indices):
        inputs, targets = super().__getitems__(indices)
        return inputs + torch.rand(len(indices), 1).numpy(), targets


def test_a_subclass_reads_its_samples_its_own_way():
    inputs, targets = fetch(Shifted(torch.arange(10.0), torch.arange(10)), [3, 1])
    assert (inputs.tolist(), targets.tolist()) == ([103.0, 101.0], [103, 101])
    assert torch.equal(fetch(Doubled(), [5, 3])[0], 2 * fetch(Digits(), [5, 3])[0])


def test_a_subclass_that_draws_numbers_is_seeded():
    first, again = fetch(Jittered(), [5, 3]), fetch(Jittered(), [5, 3])
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], fetch(Jittered(), [5, 3], epoch=1)[0])


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.arange(60.0).reshape(20, 3), torch.arange(20)),
        InMemory(np.arange(60.0, dtype=np.float32).reshape(20, 3), np.arange(20)),
        Noisy(),
    ],
)
def test_batches_that_are_read_together_are_those_read_one_by_one(dataset):
    fetcher = Fetcher(dataset, "data.train", seed=1)
    requests = [Request(2, np.array(indices)) for indices in ([3, 1, 2], [7], [0, 5, 4, 6, 1])]
    together = fetcher.read_ahead(requests)
    for (inputs, targets), request in zip(together, requests, strict=True):
        own_inputs, own_targets = fetcher.__getitems__(request)
        assert torch.equal(inputs, own_inputs)
        assert torch.equal(targets, own_targets)
        for tensor in (inputs, targets, own_inputs, own_targets):
            assert tensor.data_ptr() % 64 == 0  # products may round differently elsewhere


def test_one_batch_that_cannot_be_read_leaves_the_others():
    fetcher = Fetcher(InMemory(np.arange(8.0), np.arange(8)), "data.train", seed=0)
    first, bad, last = fetcher.read_ahead([Request(0, np.array([i])) for i in (3, 99, 5)])
    assert (first[1].tolist(), last[1].tolist()) == ([3], [5])
    assert isinstance(bad, Unreadable)
    assert "index 99" in bad.message


def test_who_may_draw_numbers_is_read_batch_by_batch():
    class Whole(InMemory):
        def __getitems__(self, indices):
            sizes.append(len(indices))
            return super().__getitems__(indices)

    sizes = []
    fetcher = Fetcher(Whole(torch.arange(8.0), torch.arange(8)), "data.train", seed=0)
    sizes.clear()
    fetcher.read_ahead([Request(0, np.array([1, 2])), Request(0, np.array([3]))])
    assert sizes == [2, 1]
    assert not fetcher.reads_plainly


def test_a_large_batch_stays_where_it_is():
    rows = np.zeros((2, 1 << 16), np.float32)
    assert aligned(torch.from_numpy(rows)[:, 1:]).data_ptr() == rows.ctypes.data + 4
    assert aligned(torch.arange(9.0)[1:]).data_ptr() % 64 == 0


class Ragged(Noisy):
    """Samples of three parts, the first of a length of its own."""

    def __getitem__(self, index):
        return torch.rand(index + 1), f"text {index}", {"index": index}


def pad(samples):
    rows, texts, indices = zip(*samples, strict=True)
    noise = torch.rand(len(samples))
    inputs = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return inputs, (texts, [each["index"] for each in indices], noise)


def test_a_collate_function_forms_batches_of_any_samples():
    inputs, (texts, indices, _) = fetch(Ragged(), [2, 0], collate=pad)
    assert inputs.shape == (2, 3)
    assert texts == ("text 2", "text 0")
    assert indices == [2, 0]


def test_a_collate_function_sees_the_samples_of_whole_data_sets():
    for dataset in (
        TensorDataset(torch.arange(8.0), torch.arange(8)),
        InMemory(np.arange(8.0), np.array([str(i) for i in range(8)])),
        Jittered(),
    ):
        samples, count = fetch(dataset, [3, 1], collate=lambda samples: (samples, len(samples)))
        assert count == 2
        assert [int(target) for _, target in samples] == [int(dataset[i][1]) for i in (3, 1)]


def test_what_a_collate_function_draws_follows_from_seed_epoch_and_first_index():
    def noise(indices, **place):
        return fetch(Ragged(), indices, collate=pad, **place)[1][2]

    first = noise([2, 0])
    torch.rand(1)
    assert torch.equal(noise([2, 0]), first)
    assert torch.equal(noise([2, 5]), first)
    for other in (noise([0, 2]), noise([2, 0], epoch=1), noise([2, 0], seed=1)):
        assert not torch.equal(other, first)
    assert not torch.equal(first[:1], torch.as_tensor(fetch(Ragged(), [2], collate=pad)[0][0, :1]))


def fails_alone(samples):
    if len(samples) == 1:
        raise ValueError("too few")
    return default_collate(samples)


@pytest.mark.parametrize(
    ("collate", "indices", "message"),
    [
        (
            lambda samples: {"x": 1},
            [2, 3],
            r"data.collate is .*<lambda>, which gives a mapping with x for 2 samples of "
            r"data.train, not \(inputs, targets\); return a pair.",
        ),
        (lambda samples: None, [2], r"gives None for data.train\[2\] alone, not"),
        (lambda samples: (1, 2, 3), [2], "gives a tuple of 3 for"),
        (
            lambda samples: samples[0]["y"],
            [2, 3],
            "which fails for 2 samples of data.train, TypeError: .*; let it take lists of any "
            "length, since ranks also read single samples, and leave the samples unchanged.",
        ),
        (
            fails_alone,
            [2],
            r"data.collate is fails_alone, which fails for data.train\[2\] alone, ValueError: "
            "too few; let it take lists of any length",
        ),
    ],
)
def test_what_a_collate_function_does_wrong_is_named(collate, indices, message):
    fault = fetch(Noisy(), indices, collate=collate)
    assert isinstance(fault, Unreadable)
    assert re.search(message, fault.message)


def test_a_user_error_of_a_collate_function_passes_unchanged():
    def refuse(samples):
        raise DataError("x is y; do z.")

    assert fetch(Noisy(), [2], collate=refuse) == Unreadable("x is y; do z.")


def fetch_with_singles(dataset, indices, collate=None):
    fetcher = Fetcher(dataset, "data.train", 0, collate)
    return fetcher.read_with_singles(Request(0, np.array(indices)))


class WholeInColumns(Noisy):
    """Whole batches of containers, with noise that depends on the batch."""

    def __getitems__(self, indices):
        rows = np.array(indices, np.float32)[:, None] + np.random.rand(len(indices), 3)
        texts = [f"text {index}" for index in indices]
        return {"a": rows, "b": Pair(torch.tensor(indices), rows[:, 0])}, (texts, rows[:, :2])


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def same(one, other):
    """Whether two batches are equal, in values and containers."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and all(map(same, one, other))
    return one == other


def row(batch, number):
    """One sample of a batch, as a batch."""
    if isinstance(batch, dict):
        return {key: row(part, number) for key, part in batch.items()}
    if isinstance(batch, tuple):
        parts = [row(part, number) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch[number : number + 1]


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.arange(24.0).reshape(8, 3), torch.arange(8)),
        InMemory(np.arange(24.0).reshape(8, 3), np.arange(8)),
        Jittered(),
        WholeInColumns(),
        Noisy(),
    ],
)
@pytest.mark.parametrize("indices", [[5, 0, 3], [4]])
def test_a_batch_comes_with_its_samples_from_the_same_reading(dataset, indices):
    batch, singles = fetch_with_singles(dataset, indices)
    assert same(tuple(batch), tuple(fetch(dataset, indices)))
    assert len(singles) == len(indices)
    for number, alone in enumerate(singles):
        assert same(tuple(alone), row(tuple(batch), number))


def test_parts_of_whole_batches_are_tensors():
    inputs, (texts, rows) = fetch(WholeInColumns(), [5, 0])
    assert {type(part) for part in (inputs["a"], *inputs["b"], rows)} == {torch.Tensor}
    assert isinstance(inputs["b"], Pair)
    assert texts == ["text 5", "text 0"]


class Drawing(Noisy):
    """A data set with a generator of its own, so that no reading is like another."""

    generator = torch.Generator()

    def __getitem__(self, index):
        return {"x": torch.rand((), generator=self.generator), "y": index}


def take_apart(samples):
    """Form a batch, and change the samples, as collate functions of tokenizers do."""
    targets = torch.tensor([sample.pop("y") for sample in samples])
    return torch.stack([sample["x"] for sample in samples]), targets


def test_samples_are_collated_alone_as_they_were_read():
    (inputs, targets), singles = fetch_with_singles(Drawing(), [5, 0, 3], take_apart)
    assert targets.tolist() == [5, 0, 3]
    assert torch.equal(torch.cat([alone[0] for alone in singles]), inputs)
    assert torch.equal(torch.cat([alone[1] for alone in singles]), targets)


def test_samples_that_cannot_be_copied_are_shared():
    class Uncopied:
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    class Handles(Noisy):
        def __getitem__(self, index):
            return Uncopied(), index

    batch, singles = fetch_with_singles(Handles(), [5, 0], lambda samples: (samples, None))
    assert [batch[0][0]] == singles[0][0]


@pytest.mark.parametrize(
    ("dataset", "collate", "message"),
    [
        (Noisy(), fails_alone, r"fails for data.train\[5\] alone, ValueError: too few"),
        (Broken(lambda i: 1 / 0), None, r"data.train\[5\] cannot be read, ZeroDivisionError"),
        (Broken(lambda i: (1, 2, 3)), None, r"data.train\[5\] is a tuple of 3"),
        (InMemory(np.arange(3.0), np.arange(3)), None, "index 5"),
    ],
)
def test_a_fault_with_singles_is_one_line(dataset, collate, message):
    fault = fetch_with_singles(dataset, [5, 0], collate)
    assert isinstance(fault, Unreadable)
    assert re.search(message, fault.message)


class IndexDevices(TorchDispatchMode):
    """Notes where the indices of each ``index_select`` are."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.index_select:
            self.seen.append(args[2].device.type)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [TensorDataset, InMemory])
def test_data_on_a_device_are_indexed_there(kind):
    """A GPU refuses indices on the host; the device meta, which takes them, stands for it."""
    rows = torch.zeros(8, 3, device="meta")
    with IndexDevices() as devices:
        inputs, _ = Fetcher(kind(rows, rows), "data.train", 0).__getitems__(
            Request(0, np.array([4, 1]))
        )
    assert inputs.shape == (2, 3)
    assert devices.seen == ["meta", "meta"]
