"""Where the arrays of a data set live: found, refused, and with the bits of the host."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import Subset, TensorDataset

from ddp_sgd import RunConfig, fit
from ddp_sgd.data import Arrays, Digits, InMemory
from ddp_sgd.data.device import move
from ddp_sgd.data.fetcher import Fetcher, Request
from ddp_sgd.data.placement import choose_arrays, find_arrays
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ConfigError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Own(InMemory):
    def __getitem__(self, index):
        return super().__getitem__(index)


class OwnBatches(InMemory):
    def __getitems__(self, indices):
        return super().__getitems__(indices)


def saved(folder, inputs):
    path = folder / "data.npz"
    np.savez(path, x_train=inputs, y_train=np.arange(len(inputs)))
    return Arrays(str(path))


def mapped(folder, inputs, targets=None):
    np.save(folder / "x_train.npy", inputs)
    np.save(folder / "y_train.npy", np.arange(len(inputs)) if targets is None else targets)
    return Arrays(str(folder))


def read_only(array):
    array.flags.writeable = False
    return array


BYTES = np.arange(256, dtype=np.uint8).reshape(64, 4)
FLOATS = np.linspace(0, 1, 24, dtype=np.float32).reshape(8, 3)
SETS = {
    "Digits": lambda _: Digits(),
    "arrays": lambda _: InMemory(FLOATS, np.arange(8)),
    "strided": lambda _: InMemory(FLOATS.T[:, :3], np.arange(3)),
    "read-only": lambda _: InMemory(read_only(FLOATS.copy()), np.arange(8)),
    "bytes": lambda _: InMemory(BYTES, np.arange(64)),
    "tensors": lambda _: InMemory(torch.rand(8, 2), torch.arange(8)),
    "TensorDataset": lambda _: TensorDataset(torch.rand(8, 2), torch.arange(8)),
    "file of floats": lambda folder: saved(folder, np.random.default_rng(0).random((8, 3))),
    "file of bytes": lambda folder: saved(folder, BYTES),
    "mapped bytes": lambda folder: mapped(folder, BYTES),
    "mapped floats": lambda folder: mapped(folder, FLOATS),
    "mapped doubles": lambda folder: mapped(folder, np.random.default_rng(0).random((8, 3))),
    "mapped numbers": lambda folder: mapped(folder, BYTES.astype(np.int16) - 99, BYTES[:, 0]),
    "mapped maps": lambda folder: mapped(folder, BYTES, BYTES.astype(np.float32)),
}


@pytest.mark.parametrize("name", SETS)
def test_rows_have_the_bits_that_the_data_set_gives(name, tmp_path):
    dataset = SETS[name](tmp_path)
    indices = np.random.default_rng(1).permutation(len(dataset))
    expected = Fetcher(dataset, "data.train", 0).__getitems__(Request(0, indices))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arrays = find_arrays(dataset)
    found = move(arrays.rows(torch.from_numpy(indices)), CPU)
    for part, each in zip(found, expected, strict=True):
        assert part.dtype == each.dtype
        assert torch.equal(part, each)


@pytest.mark.parametrize("keep", [saved, mapped])
def test_bytes_of_a_file_stay_bytes_until_they_are_used(tmp_path, keep):
    assert find_arrays(keep(tmp_path, BYTES)).inputs.dtype == torch.uint8


@pytest.mark.parametrize("targets", [BYTES, BYTES.astype(np.float64), BYTES.astype(">i8")])
def test_mapped_targets_that_are_converted_by_batches_are_no_rows(tmp_path, targets):
    assert find_arrays(mapped(tmp_path, FLOATS, targets[:8])) is None


@pytest.mark.parametrize(
    "dataset",
    [
        Own(FLOATS, np.arange(8)),
        OwnBatches(FLOATS, np.arange(8)),
        Subset(InMemory(FLOATS, np.arange(8)), [0, 1]),
        TensorDataset(torch.zeros(2), torch.zeros(2), torch.zeros(2)),
        TensorDataset(torch.zeros(2), torch.zeros(2, device="meta")),
        TensorDataset(torch.eye(2).to_sparse(), torch.zeros(2)),
        InMemory(FLOATS.astype(">f4"), np.arange(8)),
        InMemory(FLOATS[::-1], np.arange(8)),
        InMemory(BYTES.astype(np.uint16), np.arange(64)),
        InMemory(np.array(["a", "b"]), np.arange(2)),
        InMemory([1, 2], [3, 4]),
        [(torch.zeros(2), 1)],
    ],
)
def test_other_data_sets_have_no_arrays(dataset):
    assert find_arrays(dataset) is None


def choose(dataset, *, wanted, device=CUDA, workers=0, collate=None, sharing=1):
    return choose_arrays(
        dataset,
        "data.train",
        wanted=wanted,
        device=device,
        workers=workers,
        collate=collate,
        sharing=sharing,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"device": CPU},
            "data.device is accelerator while the run computes on the cpu; set "
            "runtime.device=cuda, or data.device=auto.",
        ),
        (
            {"workers": 2},
            "data.device is accelerator while data.workers is 2; set data.workers=0, or "
            "data.device=auto.",
        ),
        (
            {"collate": list},
            "data.device is accelerator while data.collate names a function, which gets samples; "
            "leave that out, or data.device=auto.",
        ),
        (
            {"dataset": Own(FLOATS, np.arange(8))},
            "data.device is accelerator while data.train is read by methods of its own; name a "
            "torch.utils.data.TensorDataset of inputs and targets, ddp_sgd.data.InMemory or "
            "ddp_sgd.data.Arrays, or data.device=auto.",
        ),
    ],
)
def test_an_accelerator_that_cannot_have_the_data_is_refused(options, message):
    with pytest.raises(ConfigError) as refused:
        choose(**{"dataset": Digits(), "wanted": "accelerator", **options})
    assert str(refused.value) == message
    assert choose(**{"dataset": Digits(), "wanted": "host", **options}) is None


def test_the_run_refuses_it_before_the_first_step(tmp_path):
    config = RunConfig(
        output_dir=str(tmp_path), data={"device": "accelerator"}, wandb={"mode": "disabled"}
    )
    with pytest.raises(ConfigError, match="data.device is accelerator while the run computes on"):
        fit(config, Runtime())


def test_arrays_stay_on_the_host_where_they_do_not_fit(monkeypatch):
    digits = Digits()
    needed = 4 * (digits.inputs.nbytes + digits.targets.nbytes)
    for free, sharing in ((needed - 1, 1), (2 * needed - 1, 2)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        assert choose(digits, wanted="auto", sharing=sharing).inputs.device == CPU
    assert choose(digits, wanted="host").inputs.device == CPU


def test_arrays_on_another_device_are_read_by_the_data_set():
    elsewhere = TensorDataset(torch.zeros(2, device="meta"), torch.zeros(2, device="meta"))
    assert choose(elsewhere, wanted="auto") is None
