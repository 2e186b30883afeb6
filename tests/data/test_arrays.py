import numpy as np
import pytest

from ddp_sgd.data import Arrays
from ddp_sgd.errors import DataError


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "x.npz"

    def save(**arrays):
        np.savez(path, **arrays)
        return str(path)

    return save


def test_both_splits_are_read(archive):
    path = archive(
        x_train=np.ones((3, 2)), y_train=[0, 1, 2], x_test=np.zeros((2, 2)), y_test=[0, 1]
    )
    train, test = Arrays(path), Arrays(path, split="test")
    assert (len(train), len(test)) == (3, 2)
    assert train.inputs.dtype == np.float32
    assert train.targets.dtype == np.int64


def test_file_in_the_home_folder(archive, tmp_path, monkeypatch):
    archive(x_train=np.ones((3, 2)), y_train=[0, 1, 2])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Arrays("~/x.npz")) == 3


def test_bytes_become_numbers_from_zero_to_one(archive):
    path = archive(x_train=np.array([[0, 255], [51, 102]], dtype=np.uint8), y_train=[0.5, 1.5])
    data = Arrays(path)
    assert data.inputs.dtype == np.uint8  # kept small in memory
    batch, targets = data.__getitems__([0, 1])
    assert batch.dtype == targets.dtype == np.float32
    np.testing.assert_allclose(batch, [[0, 1], [0.2, 0.4]], rtol=1e-6)
    np.testing.assert_allclose(data[1][0], [0.2, 0.4], rtol=1e-6)


def test_what_is_wrong_with_a_file_is_named(archive, tmp_path):
    with pytest.raises(DataError, match=r"missing.npz is missing; give the path"):
        Arrays(str(tmp_path / "missing.npz"))
    with pytest.raises(DataError, match=r"has x_train and no y_train"):
        Arrays(archive(x_train=np.ones(3)))
    with pytest.raises(DataError, match=r"y_train in .* is of type <U1"):
        Arrays(archive(x_train=np.ones(3), y_train=list("abc")))
    with pytest.raises(DataError, match=r"3 inputs and 2 targets"):
        Arrays(archive(x_train=np.ones(3), y_train=np.ones(2)))
    with pytest.raises(DataError, match=r"split is 'eval'; choose train or test"):
        Arrays(archive(x_train=np.ones(3), y_train=np.ones(3)), split="eval")


def test_pickles_and_rubbish_are_refused(archive, tmp_path):
    path = archive(x_train=np.array([print], dtype=object), y_train=np.ones(1))
    with pytest.raises(DataError, match=r"is not a readable .npz file"):
        Arrays(path)
    rubbish = tmp_path / "rubbish.npz"
    rubbish.write_bytes(b"PK\x03\x04 and nothing else")
    with pytest.raises(DataError, match=r"is not a readable .npz file"):
        Arrays(str(rubbish))
    single = tmp_path / "single.npy"
    np.save(single, np.ones(3))
    with pytest.raises(DataError, match=r"is a single array"):
        Arrays(str(single))
