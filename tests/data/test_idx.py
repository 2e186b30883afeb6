import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from _pytest.outcomes import Failed, Skipped
from fashion_mnist import require_fashion_mnist
from ranks import run_ranks

from ddp_sgd import RunConfig, fit
from ddp_sgd.data import Idx
from ddp_sgd.data.idx import FASHION_MNIST, read_idx
from ddp_sgd.data.placement import find_arrays
from ddp_sgd.errors import DataError

CODES = {"u1": 8, "i1": 9, "i2": 11, "i4": 12, "f4": 13, "f8": 14}
IMAGES = np.arange(5 * 3 * 2, dtype=np.uint8).reshape(5, 3, 2)
LABELS = np.array([3, 0, 2, 1, 0], np.uint8)


def idx_bytes(array):
    """The format, by its description."""
    head = bytes([0, 0, CODES[array.dtype.str[1:]], array.ndim])
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return head + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def save(path, array, pack=lambda data: data):
    path.write_bytes(pack(idx_bytes(np.asarray(array))))
    return str(path)


def save_folder(folder, suffix="", pack=lambda data: data):
    for name, images, labels in (("train", IMAGES, LABELS), ("t10k", IMAGES[:2], LABELS[:2])):
        save(folder / f"{name}-images-idx3-ubyte{suffix}", images, pack)
        save(folder / f"{name}-labels-idx1-ubyte{suffix}", labels, pack)
    return str(folder)


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress)])
def test_a_folder_has_two_splits_plain_or_packed(tmp_path, suffix, pack):
    train, test = (Idx(save_folder(tmp_path, suffix, pack), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (5, 2)
    for data, count in ((train, 5), (test, 2)):
        assert (data.inputs.shape, data.inputs.dtype) == ((count, 1, 3, 2), np.uint8)
        assert np.array_equal(data.inputs[:, 0], IMAGES[:count])
        assert (data.targets.dtype, data.targets.tolist()) == (np.int64, LABELS[:count].tolist())


def test_two_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "a", IMAGES, gzip.compress)
    save(tmp_path / "b", LABELS)
    data = Idx("~/a", targets="~/b")
    inputs, targets = data.__getitems__([4, 1])
    assert np.array_equal(inputs[:, 0], IMAGES[[4, 1]])
    assert targets.tolist() == [0, 0]


@pytest.mark.parametrize("kind", CODES)
def test_every_number_type_is_read(tmp_path, kind):
    limits = np.array([[-2, 1.5, 0], [100, 7, 0.25]]).astype(kind)
    path = Path(save(tmp_path / "x", limits))
    found = read_idx(path)
    assert found.dtype == np.dtype(kind)
    assert found.dtype.isnative
    assert found.flags.writeable  # or torch warns
    assert np.array_equal(found, limits)
    data = Idx(str(path), targets=str(path))
    assert data.inputs.dtype == (np.uint8 if kind == "u1" else np.float32)
    assert data.targets.dtype == (np.float32 if kind[0] == "f" else np.int64)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 3, 5)])
def test_only_three_dimensions_are_images_without_channels(tmp_path, shape):
    path = save(tmp_path / "x", np.zeros(shape, np.uint8))
    assert Idx(path, targets=path).inputs.shape == shape


def test_batches_are_rows_that_may_live_on_a_device(tmp_path):
    arrays = find_arrays(Idx(save_folder(tmp_path)))
    assert arrays.inputs.shape == (5, 1, 3, 2)
    assert arrays.convert is None  # bytes up to the transforms


WHOLE = idx_bytes(IMAGES)
DAMAGED = {
    "empty": (b"", "begins with the bytes of an empty file, which no IDX file does"),
    "text": (b"pixels and more", "begins with the bytes 70 69 78 65, which no IDX file does"),
    "other type": (b"\0\0\x0a\x03" + WHOLE[4:], "begins with the bytes 00 00 0a 03, which no IDX"),
    "no dimension": (b"\0\0\x08\0\1", "begins with the bytes 00 00 08 00, which no IDX file does"),
    "half a header": (WHOLE[:9], "has 9 bytes while its header says 16, for the shape (5, 0, 0)"),
    "truncated": (WHOLE[:-1], "has 45 bytes while its header says 46, for the shape (5, 3, 2)"),
    "too long": (WHOLE + b"\0", "has 47 bytes while its header says 46, for the shape (5, 3, 2)"),
    "huge": (b"\0\0\x0e\x02" + b"\xff" * 8, "has 12 bytes while its header says 1475739525"),
    "truncated gzip": (gzip.compress(WHOLE)[:-12], "cannot be read: Compressed file ended before"),
    "damaged gzip": (
        gzip.compress(WHOLE)[:-8] + b"\1" * 8,
        "cannot be read: CRC check failed",
    ),
    "rubbish after a gzip header": (gzip.compress(b"")[:10] + b"\xff" * 9, "cannot be read: Error"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_what_is_wrong(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / 'x'} {message}")) as refused:
        Idx(str(tmp_path / "x"), targets=save(tmp_path / "y", LABELS))
    assert re.search(r"; (give an IDX file|download or install it again)", str(refused.value))


def test_labels_of_another_length_are_refused(tmp_path):
    images, labels = save(tmp_path / "x", IMAGES), save(tmp_path / "y", LABELS[:4])
    with pytest.raises(DataError) as refused:
        Idx(images, targets=labels)
    assert str(refused.value) == (
        f"{labels} has 4 labels while {images} has 5 images; give each image one label."
    )


def test_missing_files_and_wrong_arguments(tmp_path):
    def refusal(*args, **options):
        with pytest.raises(DataError) as refused:
            Idx(*args, **options)
        return str(refused.value)

    folder = str(tmp_path)
    missing = f"{folder}/train-images-idx3-ubyte is missing, with .gz or without; give the folder"
    assert refusal(folder).startswith(missing)
    images = save(tmp_path / "x", IMAGES)
    assert refusal(images) == (
        f"{images} is a file while targets is left out; name the file of its labels by targets, or "
        "give path the folder of both."
    )
    assert refusal(images, targets=f"{folder}/y") == (
        f"{folder}/y is missing; give the path of an IDX file."
    )
    assert refusal(folder, targets=images).startswith(
        f"{folder} cannot be read: [Errno 21] Is a di"
    )
    assert "split is 'eval'; choose train or test." in refusal(folder, "eval")
    assert "split is test while targets is" in refusal(images, "test", targets=images)


def test_a_missing_fashion_mnist_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("ddp_sgd.data.idx.FASHION_MNIST", str(tmp_path))
    with pytest.raises(DataError) as refused:
        Idx(str(tmp_path))
    assert str(refused.value) == (
        f"{tmp_path}/train-images-idx3-ubyte.gz is missing; install Fashion-MNIST with apt install "
        "dataset-fashion-mnist, or give path the folder of its files."
    )


@pytest.mark.parametrize(("required", "outcome"), [("", Skipped), ("1", Failed)])
def test_without_fashion_mnist_a_test_is_skipped_or_fails(monkeypatch, tmp_path, required, outcome):
    monkeypatch.setenv("REQUIRE_CLUSTER_TESTS", required)
    with pytest.raises(outcome, match="apt install dataset-fashion-mnist"):
        require_fashion_mnist(tmp_path / "nothing")


def test_fashion_mnist_is_read():
    require_fashion_mnist()
    train, test = Idx(), Idx(split="test")
    assert (train.inputs.shape, test.inputs.shape) == ((60000, 1, 28, 28), (10000, 1, 28, 28))
    assert np.bincount(train.targets).tolist() == [6000] * 10  # as published
    assert np.bincount(test.targets).tolist() == [1000] * 10
    assert train.inputs.mean() / 255 == pytest.approx(0.286, abs=5e-4)  # of the configuration
    assert train.inputs.std() / 255 == pytest.approx(0.353, abs=5e-4)
    trousers, bags = (train.inputs[train.targets == label].mean(axis=0)[0] for label in (1, 8))
    assert trousers[14, 14] < 100 < bags[14, 14]  # there is a gap between two legs


def component(name, **init_args):
    return {"class_path": f"ddp_sgd.{name}", "init_args": init_args}


def train(runtime, folder):
    normalize = [component("data.augment.Normalize", mean=0.286, std=0.353)]
    config = RunConfig(
        output_dir=str(folder),
        epochs=1,
        model=component("models.MLP", inputs=784, hidden=[16], classes=10),
        data={
            "train": component("data.Idx", path=FASHION_MNIST, split="train"),
            "eval": component("data.Idx", path=FASHION_MNIST, split="test"),
            "batch_size": 256,
            "train_transforms": normalize,
            "eval_transforms": normalize,
        },
        optim={"lr": 0.1, "reference_batch": 512},
        wandb={"mode": "disabled"},
    )
    return fit(config, runtime).scores


def test_two_ranks_learn_fashion_mnist(tmp_path):
    require_fashion_mnist()
    one, other = run_ranks(2, train, tmp_path)
    assert one == other
    assert one["eval/count"] == 10_000
    assert one["eval/accuracy"] > 0.75
