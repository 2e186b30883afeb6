"""The way of data to a GPU: equal bits on each, no waits, errors in their turn; needs CUDA."""

import numpy as np
import pytest
import torch
from ranks import run_ranks, srun_environment
from torch import nn
from torch.utils.data import TensorDataset

from ddp_sgd.config import RunConfig
from ddp_sgd.data import Arrays, Digits
from ddp_sgd.data.device import Prefetcher, Transfer, move
from ddp_sgd.data.loader import TrainLoader
from ddp_sgd.data.placement import Rows, find_arrays
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.fit import fit
from ddp_sgd.engine.reading import _ranks_on_device
from ddp_sgd.engine.step import Stepper
from ddp_sgd.errors import DataError
from ddp_sgd.models import MLP

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
CUDA = torch.device("cuda", 0)


class Samples:
    """Digits, read one by one."""

    def __init__(self):
        self.digits = Digits()

    def __len__(self):
        return len(self.digits)

    def __getitem__(self, index):
        return self.digits[index]


class Whole(Samples):
    """Digits in whole batches, by a method of its own."""

    def __getitems__(self, indices):
        return self.digits.__getitems__(indices)


class Failing(Samples):
    """Has a sample that cannot be read."""

    def __getitem__(self, index):
        if index == 700:
            raise OSError("disk on fire")
        return super().__getitem__(index)


class Large(Samples):
    """Digits of whole numbers, some hundred kilobytes a batch, so that copies take a while."""

    def __init__(self):
        super().__init__()
        self.digits.inputs = np.repeat(self.digits.inputs, 64, axis=1)


def train(folder, dataset, *, width=64, loss=None, **data):
    config = RunConfig(
        output_dir=str(folder),
        name=f"run-{len(list(folder.iterdir()))}",
        epochs=2,
        data=data,
        log={"every_steps": 20},
        wandb={"mode": "disabled"},
    )
    torch.manual_seed(0)
    model = MLP(width, [32], 10)
    return fit(
        config,
        Runtime(device=CUDA),
        model=model,
        train_set=dataset,
        eval_set=dataset,
        loss=loss or nn.CrossEntropyLoss(),
    )


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 2, 10)])
def test_equal_bits_wherever_the_data_live(accumulate, weights, tmp_path):
    runs = [
        train(
            tmp_path,
            dataset,
            loss=nn.CrossEntropyLoss(weight=weights),
            accumulate=accumulate,
            **data,
        )
        for dataset, data in (
            (Digits(), {"device": "host"}),
            (Digits(), {"device": "accelerator"}),
            (Digits(), {"device": "auto"}),
            (Digits(), {"workers": 2}),
            (Samples(), {}),
            (Samples(), {"workers": 1}),
            (Whole(), {}),
        )
    ]
    assert len({run.weights_digest for run in runs}) == 1
    # Data sets that list no targets may hold ignored ones: their loss is the sum of each chunk,
    # which others have as mean times number. For 29 samples these differ in the last bit of 24.
    for alike in (runs[:4], runs[4:]):
        assert [run.scores for run in alike] == [alike[0].scores] * len(alike)
    assert runs[4].scores == pytest.approx(runs[0].scores, rel=2**-23)


def test_bytes_of_a_file_have_the_bits_of_the_host(tmp_path):
    path = tmp_path / "bytes.npz"
    np.savez(path, x_train=np.arange(256, dtype=np.uint8), y_train=np.arange(256))
    data = Arrays(str(path))
    rows = torch.arange(256, device=CUDA)
    inputs, targets = move(find_arrays(data).to(CUDA).rows(rows), CUDA)
    expected, labels = data.__getitems__(np.arange(256))
    assert torch.equal(inputs.cpu(), torch.from_numpy(expected))
    assert torch.equal(targets.cpu(), torch.from_numpy(labels))


def forbid_waits(owner, name, monkeypatch, calls):
    """Let what waits for the device raise in a method, once everything was done a few times."""
    method = getattr(owner, name)

    def watched(self, *arguments):
        calls[name] = calls.get(name, 0) + 1
        torch.cuda.set_sync_debug_mode("error" if calls[name] > 5 else "default")
        try:
            return method(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize("weights", [None, torch.linspace(0.5, 2, 10)])
@pytest.mark.parametrize(
    ("dataset", "data"),
    [
        (Digits, {"device": "host"}),
        (Digits, {"device": "accelerator"}),
        (Digits, {"workers": 2}),
        (Samples, {}),
        (Whole, {}),
    ],
)
def test_no_step_waits_for_the_device(dataset, data, weights, tmp_path, monkeypatch):
    calls = {}
    forbid_waits(Stepper, "step", monkeypatch, calls)
    forbid_waits(TrainLoader, "read_ahead", monkeypatch, calls)
    result = train(tmp_path, dataset(), loss=nn.CrossEntropyLoss(weight=weights), **data)
    assert calls == {"step": result.step, "read_ahead": result.step}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_comes_in_its_turn(workers, tmp_path, monkeypatch):
    taken, step = [], Stepper.step

    def count(self, batches, lr):
        taken.append(batches.samples)
        return step(self, batches, lr)

    monkeypatch.setattr(Stepper, "step", count)
    with pytest.raises(DataError, match=r"^data.train\[700\] cannot be read, OSError: disk on"):
        train(tmp_path, Failing(), workers=workers)
    with_gpu, taken[:] = list(taken), []
    config = RunConfig(output_dir=str(tmp_path), name="cpu", wandb={"mode": "disabled"})
    with pytest.raises(DataError, match=r"^data.train\[700\] cannot be read"):
        fit(config, Runtime(), model=MLP(64, [32], 10), train_set=Failing())
    assert with_gpu == taken


def place_all(trees, place):
    return [place(tree) for tree in trees]


@pytest.mark.parametrize("pinned", [False, True])
def test_no_buffer_is_overwritten_early_on_a_slow_device(pinned):
    """The device is kept busy, so that the host is as far ahead as it can be."""
    torch.manual_seed(0)
    table = torch.rand(5000, 300)
    items = []
    for number in range(60):
        rows = 1 + (number * 37) % 900  # ragged, now and then larger than ever
        part = torch.full((rows, 257), float(number))
        part = part.pin_memory() if pinned else part
        items.append([{"a": part, "b": Rows(table, torch.randint(5000, (rows,)))}])
    found = []
    for (item,) in Prefetcher(Transfer(CUDA)).run(items, place_all):
        torch.cuda._sleep(2_000_000)  # cycles, about a millisecond
        found.append({name: part.clone() for name, part in item.items()})
    for seen, (item,) in zip(found, items, strict=True):
        assert torch.equal(seen["a"].cpu(), item["a"])
        assert torch.equal(seen["b"].cpu(), table[item["b"].indices])


def test_nothing_is_allocated_once_the_buffers_are_there():
    items = [[(torch.full((64, 100), float(number)), torch.arange(64))] for number in range(100)]
    counts = [
        torch.cuda.memory_stats(CUDA)["allocation.all.allocated"]
        for _ in Prefetcher(Transfer(CUDA)).run(items, place_all)
    ]
    assert counts[-1] == counts[5]


@pytest.mark.parametrize("data", [{"device": "host"}, {"workers": 1}])
def test_memory_does_not_grow(data, tmp_path, monkeypatch):
    read_ahead, used = TrainLoader.read_ahead, []

    def measure(self):
        read_ahead(self)
        used.append(torch.cuda.memory_allocated(CUDA))

    monkeypatch.setattr(TrainLoader, "read_ahead", measure)
    train(tmp_path, Large(), width=4096, **data)
    steps = len(used) // 2
    small = 2**20  # losses and norms of the steps since the last sync
    assert max(used[steps:]) <= max(used[:steps]) + small


def test_arrays_move_once_if_they_fit(tmp_path):
    digits = Digits()
    before = torch.cuda.memory_allocated(CUDA)
    arrays = find_arrays(digits).to(CUDA)
    assert arrays.inputs.device == CUDA
    needed = digits.inputs.nbytes + digits.targets.nbytes
    assert needed <= torch.cuda.memory_allocated(CUDA) - before <= needed + 4096
    on_gpu = TensorDataset(arrays.inputs, arrays.targets)
    first = train(tmp_path, on_gpu)
    assert train(tmp_path, digits).weights_digest == first.weights_digest


def test_ranks_that_share_a_gpu_are_counted():
    options = {"device": "cuda", "backend": "gloo", "environment_of": srun_environment}
    assert run_ranks(2, _ranks_on_device, **options) == [2, 2]
