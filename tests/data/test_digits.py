import numpy as np
import pytest

from ddp_sgd.data import Digits
from ddp_sgd.errors import DataError


def test_the_split_is_fixed_and_keeps_the_shares_of_classes():
    train, held_out = Digits("train"), Digits("eval")
    assert (len(train), len(held_out)) == (1437, 360)
    whole = np.bincount(np.concatenate([train.targets, held_out.targets]))
    assert whole.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # as published
    assert np.abs(np.bincount(held_out.targets) - whole / 5).max() <= 1


def test_no_image_is_on_both_sides():
    sides = [{image.tobytes() for image in Digits(split).inputs} for split in ("train", "eval")]
    assert not sides[0] & sides[1]


def test_shapes_and_ranges():
    flat, image = Digits("eval"), Digits("eval", shape="image")
    assert flat.inputs.shape == (360, 64)
    assert image.inputs.shape == (360, 1, 8, 8)
    assert flat.inputs.dtype == np.float32
    assert (flat.inputs.min(), flat.inputs.max()) == (0, 1)
    assert np.array_equal(flat.inputs, image.inputs.reshape(360, 64))


def test_a_zero_looks_like_a_ring():
    zeros = Digits("train", shape="image")
    mean = zeros.inputs[zeros.targets == 0].mean(axis=0)[0]
    assert mean[3:5, 3:5].max() < 0.2 < 0.5 < mean[3:5, 2].min()


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"shape": "square"}])
def test_other_splits_and_shapes_are_refused(wrong):
    with pytest.raises(DataError, match="; choose"):
        Digits(**wrong)
