import numpy as np
import pytest
import torch

from ddp_sgd.data import InMemory
from ddp_sgd.errors import DataError


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_a_batch_is_the_stack_of_its_samples(kind):
    data = InMemory(kind(np.arange(12.0).reshape(6, 2)), kind(np.arange(6)))
    inputs, targets = data.__getitems__([4, 1])
    assert len(data) == 6
    assert inputs.tolist() == [list(data[4][0]), list(data[1][0])]
    assert targets.tolist() == [4, 1]


def test_lengths_must_agree():
    with pytest.raises(DataError, match="3 inputs and 2 targets; give each input one target"):
        InMemory(np.zeros((3, 2)), np.zeros(2))
