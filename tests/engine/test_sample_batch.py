import pytest
import torch
from torch.utils.data import IterableDataset

from ddp_sgd.data import InMemory
from ddp_sgd.engine.components import read_batch
from ddp_sgd.engine.data_sets import check_dataset
from ddp_sgd.errors import ConfigError, DataError


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(1, 2)])


def batch_of(dataset, where="data.train", batch_size=32):
    return read_batch(dataset, where, batch_size=batch_size, collate=None)


@pytest.mark.parametrize("dataset", [Stream(), 7, iter([1])])
def test_only_map_style_data_sets(dataset):
    with pytest.raises(
        ConfigError, match=r"data.train is a .*; name a map-style data set \(streaming"
    ):
        check_dataset(dataset, "data.train")


def test_no_empty_data_set():
    with pytest.raises(DataError, match=r"data.eval is empty; name a data set"):
        check_dataset(InMemory([], []), "data.eval")


@pytest.mark.parametrize(
    ("samples", "batch_size", "indices"),
    [(1, 32, [0]), (3, 32, [0, 1, 2]), (100, 1, [0, 99]), (15, 32, [0, 2, 4, 6, 8, 10, 12, 14])],
)
def test_the_batch_is_spread_over_the_data_set(samples, batch_size, indices):
    dataset = InMemory(torch.arange(samples)[:, None], torch.arange(samples))
    batch = batch_of(dataset, batch_size=batch_size)
    assert batch.indices == batch.targets.tolist() == indices
    assert [target.tolist() for target in batch.targets_of_one] == [[index] for index in indices]


def test_a_batch_that_cannot_be_read():
    class Broken(InMemory):
        def __getitem__(self, index):
            raise OSError("the disk is gone")

    dataset = Broken(torch.zeros(2, 1), torch.zeros(2))
    with pytest.raises(DataError, match=r"data.train\[0\] cannot be read, OSError: the d"):
        batch_of(dataset)
