"""Prefetching: nothing is overwritten early, and errors come in their turn, whenever a device gets
round to its work.
"""

import random
import sys
from collections import UserDict
from functools import partial

import numpy as np
import pytest
import torch
from fake_device import POISON, FakeDevice
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import TensorDataset

from ddp_sgd import RunConfig, fit
from ddp_sgd.data import Digits, InMemory, loader
from ddp_sgd.data.device import Prefetcher, move, prefetch_rows
from ddp_sgd.data.loader import EvalLoader, TrainLoader
from ddp_sgd.data.placement import ArrayPair, Rows, find_arrays
from ddp_sgd.data.sampler import EvalSampler, TrainSampler
from ddp_sgd.data.selection import Selection
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import DataError
from ddp_sgd.tree import leaves

CPU = torch.device("cpu")
TYPES = (torch.float32, torch.uint8, torch.int64, torch.bool, torch.float64)
MOMENTS = st.integers(0, 2**32).map(random.Random)  # when a device does its work
ROWS = torch.arange(700.0).reshape(70, 10)


def make_tensor(draw, number):
    """Draw a tensor whose numbers tell which one it is."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(TYPES))
    tensor = (torch.arange(np.prod(shape, dtype=int)).reshape(shape) + 7 * number).to(dtype)
    if draw(st.booleans()):
        tensor.is_locked = True
    return tensor


def make_rows(draw, number):
    indices = draw(st.lists(st.integers(0, 69), min_size=1, max_size=5))
    convert = draw(st.sampled_from([None, lambda rows: rows * 2 + number]))
    return Rows(ROWS, torch.tensor(indices), convert)


@st.composite
def make_items(draw):
    """Draw steps: each a list of micro-batches, each a tree."""
    items = []
    for number in range(draw(st.integers(1, 9))):
        micro_batches = []
        for _ in range(draw(st.integers(1, 3))):
            inputs = make_rows if draw(st.booleans()) else make_tensor
            tree = {"a": inputs(draw, number), "b": (make_tensor(draw, number), "text")}
            micro_batches.append(tree)
        items.append(micro_batches)
    return items


def values(tree):
    """Copy the tensors of a tree."""
    return [leaf.clone() for _, leaf in leaves(move(tree, CPU)) if isinstance(leaf, torch.Tensor)]


def place_all(trees, place):
    return [place(tree) for tree in trees]


class Watched:
    """Computes on trees on a fake device; a value that is not what was read is noted."""

    def __init__(self, device):
        self.device = device
        self.wrong = []

    def compute(self, tree, expected):
        """Launch what takes a while: it reads its operands twice."""
        for _ in range(2):
            self.device.launch(partial(self._look, tree, expected))

    def _look(self, tree, expected):
        found = values(tree)
        same = len(found) == len(expected) and all(map(torch.equal, found, expected))
        if not same or [f.dtype for f in found] != [e.dtype for e in expected]:
            self.wrong.append((found, expected))


@given(
    make_items(),
    MOMENTS,
    st.sampled_from([0.0, 0.3, 0.6, 0.9]),
    st.data(),
)
def test_no_buffer_is_overwritten_early_and_order_is_kept(items, moments, eagerness, data):
    device = FakeDevice(moments, eagerness)
    watched, prefetcher = Watched(device), Prefetcher(device)
    expected = [[values(tree) for tree in item] for item in items]
    for _ in range(2):  # epochs
        taken = 0
        for item in prefetcher.run(items, place_all):
            for tree, each in zip(item, expected[taken], strict=True):
                watched.compute(tree, each)
            taken += 1
            if data.draw(st.booleans()):
                prefetcher.read_ahead()
        assert taken == len(items)
    device.finish()
    assert watched.wrong == []


@given(make_items(), MOMENTS, st.data())
def test_errors_come_in_their_turn_and_a_stop_leaves_nothing_behind(items, moments, data):
    device = FakeDevice(moments)
    watched, prefetcher = Watched(device), Prefetcher(device)
    bad = data.draw(st.integers(0, len(items)))
    stop = data.draw(st.integers(0, len(items)))
    expected = [[values(tree) for tree in item] for item in items]
    reads, behind, taken = [], [], 0

    def read():
        for number, item in enumerate(items):
            reads.append(number)
            if number == bad:
                raise DataError("this one is bad; remove it.")
            yield item

    running = prefetcher.run(read(), place_all)
    while taken < stop:
        if taken == bad:
            with pytest.raises(DataError, match="this one is bad"):
                next(running)
            break
        item = next(running)
        for tree, each in zip(item, expected[taken], strict=True):
            watched.compute(tree, each)
        taken += 1
        prefetcher.read_ahead()
        prefetcher.read_ahead()
        assert len(reads) == min(taken + 1, bad + 1, len(items))  # one batch ahead, not two
    assert taken == min(stop, bad)
    running.close()
    prefetcher.read_ahead()
    assert len(reads) <= taken + 1
    # Buffers that are freed now may be written to by what the compute stream does next.
    device.launch(lambda: behind.extend(filter(callable, device.pending["copies"])))
    device.finish()
    assert behind == []
    for item in prefetcher.run(items, place_all):
        for tree, each in zip(item, expected.pop(0), strict=True):
            watched.compute(tree, each)
    device.finish()
    assert watched.wrong == []


def test_an_error_of_a_copy_comes_in_its_turn():
    prefetcher = Prefetcher(FakeDevice(random.Random(0)))
    rows = [Rows(ROWS, torch.tensor([each])) for each in (3, 70)]
    running = prefetcher.run([[each] for each in rows], place_all)
    assert next(running)
    prefetcher.read_ahead()
    with pytest.raises(IndexError):
        next(running)


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), max_size=8), MOMENTS)
def test_rows_on_the_device_are_those_of_their_indices(sizes, moments):
    device = FakeDevice(moments, moments.choice([0.0, 0.5]))
    watched = Watched(device)
    blocks = [[np.array(moments.sample(range(70), m)) for m in block] for block in sizes]
    batches = prefetch_rows(ArrayPair(ROWS, ROWS[:, 0]), blocks, device)
    for indices in [each for block in blocks for each in block]:
        inputs, targets = next(batches)
        watched.compute((inputs, targets), [ROWS[indices], ROWS[indices, 0]])
    assert next(batches, None) is None
    device.finish()
    assert watched.wrong == []


def test_a_device_that_failed_is_left_without_another_error():
    class Failed(FakeDevice):
        is_broken = False

        def has_failed(self):
            return self.is_broken

        def compute_waits(self, event):
            if self.is_broken:
                raise RuntimeError("CUDA error: device-side assert triggered")
            super().compute_waits(event)

    device = Failed(random.Random(0))
    prefetcher = Prefetcher(device)
    running = prefetcher.run([batch_of(0), batch_of(1)], place_all)
    next(running)
    device.is_broken = True
    memory = prefetcher._host[0].all_tensors()
    before = [sys.getrefcount(each) for each in memory]
    running.close()  # an error here would be a second one on the screen
    assert [sys.getrefcount(each) for each in memory] == [count + 1 for count in before]


def batch_of(number, rows=4):
    return [[torch.full((rows, 2), float(number)), torch.full((rows,), number)]]


def test_nothing_is_allocated_once_the_buffers_are_there():
    device = FakeDevice(random.Random(0))
    prefetcher = Prefetcher(device)
    items = [batch_of(number, 3 if number % 7 == 6 else 4) for number in range(40)]
    counts = [device.allocations for _ in prefetcher.run(items, place_all)]
    assert counts[-1] == counts[5] == 2 * 4 + 2 * 2  # two tensors, four host sets, two of a device


def test_the_host_does_not_wait_for_a_device_that_keeps_up():
    device = FakeDevice(random.Random(0), eagerness=0.0)
    for _ in Prefetcher(device).run([batch_of(number) for number in range(40)], place_all):
        device.finish()
    assert device.waits == 0


def test_the_host_runs_ahead_of_the_copies_by_a_ring_and_no_more():
    device = FakeDevice(random.Random(0), eagerness=0.0)
    running = Prefetcher(device).run([batch_of(number) for number in range(6)], place_all)
    for _ in range(4):
        next(running)
    assert device.waits == 0
    next(running)
    assert device.waits == 1


def test_images_keep_their_memory_format():
    images = torch.arange(48.0).reshape(2, 3, 4, 2).contiguous(memory_format=torch.channels_last)
    strided = torch.arange(24.0).reshape(2, 12)[:, ::2]
    device = FakeDevice(random.Random(0))
    ((moved, rows),) = next(Prefetcher(device).run([[(images, strided)]], place_all))
    device.finish()
    assert moved.stride() == images.stride()
    assert rows.is_contiguous()
    assert torch.equal(moved, images)
    assert torch.equal(rows, strided)


class Encoding(UserDict):
    """As a tokenizer gives it: a mapping that moves itself."""

    def to(self, device):
        return Encoding({key: value.to(device) for key, value in self.items()})


def test_what_is_no_ordinary_tensor_moves_by_itself():
    packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(3), torch.zeros(2)])
    parts = [Encoding(ids=torch.ones(2)), torch.eye(2).to_sparse(), packed, "text", None]
    device = FakeDevice(random.Random(0))
    (moved,) = next(Prefetcher(device).run([[parts]], place_all))
    assert isinstance(moved[0], Encoding)
    assert moved[1].is_sparse
    assert torch.equal(moved[2].data, packed.data)
    assert moved[3:] == ["text", None]
    assert device.allocations == 0


class Augmented:
    """Real samples with noise that must not depend on who reads them, or when."""

    def __init__(self):
        self.reads = []

    def __len__(self):
        return 23

    def __getitem__(self, index):
        self.reads.append(index)
        return {"x": torch.full((2,), float(index)) + torch.rand(2)}, index


ARRAYS = TensorDataset(torch.rand(23, 3), torch.arange(23))
BYTES = InMemory(np.arange(69, dtype=np.uint8).reshape(23, 3), np.arange(23))


@pytest.fixture
def fake(monkeypatch):
    """Let loaders copy to a fake device."""
    device = FakeDevice(random.Random(1))
    monkeypatch.setattr(loader, "open_transfer", lambda _: device)
    return device


def train_loader(dataset, *, workers=0, arrays=None):
    sampler = TrainSampler(23, global_batch=8, batch_size=4, rank=0, world_size=1, seed=3)
    return TrainLoader(
        dataset, sampler, epochs=2, workers=workers, device=CPU, collate=None, arrays=arrays
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", [Augmented(), ARRAYS, BYTES])
def test_steps_on_a_device_are_those_of_the_host(dataset, workers, request):
    """With reads ahead and without, from arrays and by the data set's own method."""
    steps = [
        (step.step, step.samples, [(m, values((m.inputs, m.targets))) for m in step.micro_batches])
        for step in train_loader(dataset).from_step(1)
    ]
    device = request.getfixturevalue("fake")
    for arrays in {None, None if workers else find_arrays(dataset)}:
        watched = Watched(device)
        loading = train_loader(dataset, workers=workers, arrays=arrays)
        for step, (number, samples, expected) in zip(loading.from_step(1), steps, strict=True):
            assert (step.step, step.samples) == (number, samples)
            for micro_batch, (batch, each) in zip(step.micro_batches, expected, strict=True):
                assert micro_batch[2:5] == batch[2:5]
                assert np.array_equal(micro_batch.indices, batch.indices)
                watched.compute((micro_batch.inputs, micro_batch.targets), each)
            if number % 2:
                loading.read_ahead()
        device.finish()
        assert watched.wrong == []


TRIPLE = TensorDataset(torch.rand(23, 3), torch.arange(23), torch.rand(23))


@pytest.mark.parametrize("selection", [Selection([0, 2], 1), Selection([2, 0]), Selection(1)])
def test_chosen_parts_on_a_device_are_those_of_the_host(selection, request):
    def batches(arrays=None):
        sampler = TrainSampler(23, global_batch=8, batch_size=4, rank=0, world_size=1, seed=3)
        options = {"epochs": 2, "workers": 0, "device": CPU, "selection": selection}
        loading = TrainLoader(TRIPLE, sampler, arrays=arrays, **options)
        for step in loading.from_step(1):
            yield from step.micro_batches

    def without_none(batch):
        return batch.inputs, () if batch.targets is None else batch.targets

    expected = [(batch.indices, values(without_none(batch))) for batch in batches()]
    has_target = selection.has_target
    device = request.getfixturevalue("fake")
    for arrays in (None, find_arrays(TRIPLE, selection)):
        watched = Watched(device)
        for batch, (indices, each) in zip(batches(arrays), expected, strict=True):
            assert np.array_equal(batch.indices, indices)
            assert (batch.targets is not None) is has_target
            watched.compute(without_none(batch), each)
        device.finish()
        assert watched.wrong == []


@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=5), max_size=8), MOMENTS)
def test_rows_of_several_arrays_on_the_device_share_their_indices(sizes, moments):
    device = FakeDevice(moments, moments.choice([0.0, 0.5]))
    watched = Watched(device)
    blocks = [[np.array(moments.sample(range(70), m)) for m in block] for block in sizes]
    arrays = ArrayPair({"x": ROWS, "y": ROWS[:, 0]}, None)
    batches = prefetch_rows(arrays, blocks, device)
    for indices in [each for block in blocks for each in block]:
        inputs, targets = next(batches)
        assert targets is None
        assert inputs["x"].indices is inputs["y"].indices
        watched.compute([inputs["x"], inputs["y"]], [ROWS[indices], ROWS[indices, 0]])
    assert next(batches, None) is None
    device.finish()
    assert watched.wrong == []


@pytest.mark.usefixtures("fake")
def test_nothing_is_read_beyond_the_end_of_an_epoch():
    dataset = Augmented()
    loading = train_loader(dataset)
    reads = []
    for _ in loading.from_step(0):
        loading.read_ahead()
        reads.append(len(dataset.reads))
    assert reads == [16, 23, 23, 39, 46, 46]


@pytest.mark.parametrize("dataset", [Augmented(), ARRAYS])
def test_chunks_on_a_device_are_those_of_the_host(dataset, request):
    def chunks(arrays=None):
        sampler = EvalSampler(23, batch_size=5, rank=0, world_size=1)
        return EvalLoader(dataset, sampler, seed=3, workers=0, device=CPU, arrays=arrays)

    expected = [(number, samples, values(parts)) for number, samples, *parts in chunks()]
    device = request.getfixturevalue("fake")
    watched = Watched(device)
    for arrays in (None, find_arrays(dataset)):
        for chunk, (number, samples, each) in zip(chunks(arrays), expected, strict=True):
            assert chunk[:2] == (number, samples)
            watched.compute(chunk[2:], each)
    device.finish()
    assert watched.wrong == []


class Samples:
    """Digits, read one by one."""

    def __init__(self, split):
        self.digits = Digits(split)

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        return self.digits[index]


@pytest.mark.parametrize("kind", [Digits, Samples])
def test_a_run_with_prefetching_equals_one_without(kind, tmp_path, monkeypatch):
    """Copies are over at once here, since the run computes on the host."""

    def run(name):
        config = RunConfig(
            output_dir=str(tmp_path),
            name=name,
            epochs=2,
            data={"accumulate": 3},
            wandb={"mode": "disabled"},
        )
        return fit(config, Runtime(), train_set=kind("train"), eval_set=kind("eval"))

    expected = run("direct")
    device = FakeDevice(random.Random(0), eagerness=1.0)
    monkeypatch.setattr(loader, "open_transfer", lambda _: device)
    found = run("prefetched")
    assert device.allocations > 0
    assert found.weights_digest == expected.weights_digest
    assert found.scores == expected.scores


def test_an_early_look_at_a_fake_device_would_be_seen():
    """The tests above can fail: memory that no copy has reached holds other numbers."""
    device = FakeDevice(random.Random(0), eagerness=0.0)
    ((tensor,),) = (next(Prefetcher(device).run([[torch.ones(1, dtype=torch.uint8)]], place_all)),)
    assert tensor.tolist() != [1]
    device.finish()
    assert tensor.tolist() == [1]
    assert POISON != 1
