import tracemalloc

import numpy as np
import pytest
import torch

from ddp_sgd.data import InMemory
from ddp_sgd.data.fetcher import Fetcher, Request
from ddp_sgd.errors import DataError


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_batch_is_the_stack_of_its_samples(kind):
    data = InMemory(kind(np.arange(12.0).reshape(6, 2)), kind(np.arange(6)))
    inputs, targets = data.__getitems__([4, 1])
    assert len(data) == 6
    assert inputs.tolist() == [list(data[4][0]), list(data[1][0])]
    assert targets.tolist() == [4, 1]


@pytest.mark.parametrize("indices", [[4, 1], np.array([4, 1])])
def test_arrays_stay_arrays_and_tensors_stay_tensors(indices):
    for part in (np.arange(6.0), torch.arange(6.0)):
        batch, _ = InMemory(part, part).__getitems__(indices)
        assert type(batch) is type(part)
        assert batch.dtype == part.dtype
        assert batch.tolist() == [4.0, 1.0]


def kept_elsewhere(tmp_path):
    """Arrays that a batch must be copied from: in a file, not to be written to, or with gaps."""
    values = np.arange(12.0).reshape(6, 2)
    np.save(tmp_path / "x.npy", values)
    locked = values.copy()
    locked.flags.writeable = False
    return {
        "in a file": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "not to be written to": locked,
        "repeated": np.broadcast_to(values[0], (6, 2)),
        "by columns": np.asfortranarray(values),
        "every second": np.arange(24.0).reshape(12, 2)[::2],
    }


def test_arrays_may_be_kept_in_many_ways(tmp_path):
    for how, inputs in kept_elsewhere(tmp_path).items():
        data = InMemory(inputs, np.arange(6))
        batch, _ = Fetcher(data, "data.train", 0).__getitems__(Request(0, np.array([4, 1])))
        assert batch.tolist() == [inputs[4].tolist(), inputs[1].tolist()], how
        batch.zero_()  # the batch is a copy
        assert inputs[4].any()


def test_a_batch_of_a_strided_array_does_not_copy_all_of_it():
    columns = np.zeros((1000, 100_000), dtype=np.uint8).T
    data = InMemory(columns, np.zeros(100_000))
    tracemalloc.start()
    data.__getitems__(np.array([4, 1]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000


def test_lengths_must_agree():
    with pytest.raises(DataError, match="3 inputs and 2 targets; give each input one target"):
        InMemory(np.zeros((3, 2)), np.zeros(2))


@pytest.mark.parametrize("values", [[[1.0], [2.0]], ((1.0,), (2.0,))])
def test_lists_are_named_and_arrays_of_them_are_read(values):
    request = Request(0, np.array([1, 0]))
    fault = Fetcher(InMemory(values, [0, 1]), "data.train", 0).__getitems__(request)
    assert fault.message == (
        f"the data set holds a {type(values).__name__}; give InMemory arrays or tensors, such as "
        "numpy.array(values, numpy.float32)."
    )
    arrays = InMemory(np.array(values, np.float32), np.array([0, 1]))
    assert Fetcher(arrays, "data.train", 0).__getitems__(request)[0].tolist() == [[2.0], [1.0]]
