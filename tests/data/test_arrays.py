import multiprocessing
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks

from ddp_sgd import RunConfig, fit
from ddp_sgd.data import Arrays
from ddp_sgd.errors import DataError
from ddp_sgd.models import MLP


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


BYTES = np.random.default_rng(0).integers(0, 256, (20, 3), np.uint8)
CLASSES = np.arange(20) % 7


def save(folder, inputs=BYTES, targets=CLASSES, split="train"):
    np.save(folder / f"x_{split}.npy", inputs)
    np.save(folder / f"y_{split}.npy", targets)
    return str(folder)


def pair(folder, inputs=BYTES, targets=CLASSES):
    save(folder, inputs, targets)
    return Arrays(str(folder / "x_train.npy"), targets=str(folder / "y_train.npy"))


def test_a_folder_of_files_has_both_splits(tmp_path):
    save(tmp_path)
    train, test = (
        Arrays(str(tmp_path)),
        Arrays(save(tmp_path, BYTES[:4], CLASSES[:4], "test"), "test"),
    )
    assert (len(train), len(test)) == (20, 4)
    for data in (train, test, pair(tmp_path)):
        assert data.is_mapped
        inputs, targets = data.__getitems__(np.array([3, 1]))
        assert inputs.dtype == np.uint8  # up to the device
        assert np.array_equal(inputs, BYTES[[3, 1]])
        assert (targets.dtype, targets.tolist()) == (np.int64, [3, 1])


def test_files_in_the_home_folder(tmp_path, monkeypatch):
    save(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(Arrays("~")) == len(Arrays("~/x_train.npy", targets="~/y_train.npy")) == 20


@pytest.mark.parametrize("kind", ["f2", "f4", ">f4", "f8", "i1", "u2", "i8", "?"])
def test_other_inputs_become_float32_row_by_row(tmp_path, kind):
    stored = (BYTES % 100).astype(kind)
    data = pair(tmp_path, stored)
    assert data.inputs.dtype == stored.dtype
    expected = stored.astype(np.float32)
    inputs, _ = data.__getitems__([4, 1])
    assert inputs.dtype == data[4][0].dtype == np.float32
    assert np.array_equal(inputs, expected[[4, 1]])
    assert np.array_equal(data[4][0], expected[4])


@pytest.mark.parametrize("shape", [(20,), (20, 2)])
@pytest.mark.parametrize(
    ("kind", "given"),
    [("u1", "i8"), ("u2", "i8"), (">i4", "i8"), ("?", "i8"), ("f8", "f4"), ("f4", "f4")],
)
def test_whole_numbers_as_targets_become_classes(tmp_path, shape, kind, given):
    stored = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    data = pair(tmp_path, targets=stored)
    _, targets = data.__getitems__([4, 1])
    assert targets.dtype == data[4][1].dtype == np.dtype(given)
    assert np.array_equal(targets, stored[[4, 1]])
    assert np.array_equal(data[4][1], stored[4])


def test_all_labels_are_known_before_the_first_step(tmp_path):
    """So that one without a score is found, whatever its type; torch has no minimum of uint16."""
    data = pair(tmp_path, targets=CLASSES.astype(np.uint16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for each in (data, pair(tmp_path)):
            listed = torch.as_tensor(each.targets)
            assert (listed.dtype, listed.max()) == (torch.int64, 6)


def test_samples_may_be_changed_and_the_files_stay(tmp_path):
    data = pair(tmp_path, BYTES, CLASSES[:, None])
    for part in (*data[4], *data.__getitems__([4])):
        np.add(part, 1, out=part)
    assert np.array_equal(np.load(tmp_path / "x_train.npy"), BYTES)
    assert np.array_equal(data.inputs, BYTES)
    with pytest.raises(ValueError, match="read-only"):
        data.inputs[0] = 0


def test_columns_of_a_file_are_read_as_rows(tmp_path):
    inputs, _ = pair(tmp_path, np.asfortranarray(BYTES)).__getitems__([4, 1])
    assert np.array_equal(inputs, BYTES[[4, 1]])


class Own(Arrays):
    """Arrays with something besides."""

    def __init__(self, path):
        super().__init__(path)
        self.name = "mine"


def test_a_pickle_names_the_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, np.zeros((20, 10_000), np.uint8))
    packed = pickle.dumps(Own("."))
    assert len(packed) < 1000
    monkeypatch.chdir("/")
    again = pickle.loads(packed)
    assert (again.name, again.inputs.shape) == ("mine", (20, 10_000))
    assert again.targets.tolist() == CLASSES.tolist()


def test_a_pickle_of_an_archive_holds_its_arrays(archive):
    path = archive(x_train=BYTES, y_train=CLASSES)
    packed = pickle.dumps(Arrays(path))
    Path(path).unlink()
    assert np.array_equal(pickle.loads(packed).inputs, BYTES)


def refusal(*args, **options):
    with pytest.raises(DataError) as refused:
        Arrays(*map(str, args), **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_wrong_files_are_named(tmp_path):
    inputs, targets = tmp_path / "x_train.npy", tmp_path / "y_train.npy"
    assert refusal(tmp_path) == f"{inputs} is missing; write it with numpy.save."
    save(tmp_path, targets=CLASSES[:-1])
    assert refusal(tmp_path) == (
        "the data set has 20 inputs and 19 targets; give each input one target."
    )
    assert refusal(tmp_path, "test").startswith(f"{tmp_path}/x_test.npy is missing")
    save(tmp_path, targets=np.array([{}] * 20))
    assert refusal(tmp_path) == (
        f"{targets} is not a readable .npy file: Array can't be memory-mapped: Python objects in "
        "dtype; write it with numpy.save."
    )
    save(tmp_path, np.array(["a"] * 20))
    assert f"{inputs} is of type <U1 and shape (20,); save numbers, one row" in refusal(tmp_path)
    save(tmp_path, np.float32(1))
    assert f"{inputs} is of type float32 and shape (); save numbers, one row" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUM", b"rubbish" * 30, "half", "half a header", "zip"]
)
def test_a_file_that_is_no_npy_is_named(tmp_path, content):
    save(tmp_path, BYTES.repeat(50, axis=1))
    path = tmp_path / "x_train.npy"
    if content == "zip":
        with path.open("wb") as stream:
            np.savez(stream, x=BYTES)
    else:
        whole = path.read_bytes()
        path.write_bytes({"half": whole[:1000], "half a header": whole[:50]}.get(content, content))
    assert refusal(tmp_path).startswith(f"{path} is not a readable .npy file: ")


def test_arguments_that_do_not_go_together_are_refused(tmp_path):
    save(tmp_path)
    inputs, targets = tmp_path / "x_train.npy", str(tmp_path / "y_train.npy")
    assert refusal(inputs, "test", targets=targets) == (
        f"split is test while targets is {targets}, of which there is one; leave split out."
    )
    assert refusal(tmp_path, targets=targets) == (
        f"targets is {targets} while {tmp_path} is a folder; give path the file of the inputs, or "
        "leave targets out."
    )
    assert refusal(inputs) == (
        f"{inputs} is a single array; write x_train and y_train by numpy.savez, or name the .npy "
        "file of its targets by targets."
    )
    assert refusal(tmp_path / "nothing") == (
        f"{tmp_path}/nothing is missing; give the path of a .npz file, or of a folder of .npy "
        "files."
    )


def test_files_without_rows_are_empty(tmp_path):
    assert len(Arrays(save(tmp_path, BYTES[:0], CLASSES[:0]))) == 0


def train_each_way(runtime, folder):
    """Train on the same floats from a file of both, from mapped files, and by loader processes."""
    digests = []
    for number, (path, workers) in enumerate((("x.npz", 0), (".", 0), (".", 1))):
        data = {"class_path": "ddp_sgd.data.Arrays", "init_args": {"path": str(folder / path)}}
        config = RunConfig(
            output_dir=str(folder / str(number)),
            epochs=2,
            data={"train": data, "eval": None, "batch_size": 3, "workers": workers},
            wandb={"mode": "disabled"},
        )
        torch.manual_seed(0)
        digests.append(fit(config, runtime, model=MLP(3, [4], 7)).weights_digest)
    return digests


def test_mapped_arrays_train_the_same_weights(tmp_path):
    floats = BYTES / np.float32(255)
    np.savez(tmp_path / "x.npz", x_train=floats, y_train=CLASSES)
    save(tmp_path, floats, CLASSES.astype(np.uint8))
    (first, *others), on_rank_1 = run_ranks(2, train_each_way, tmp_path)
    assert others == [first, first]
    assert on_rank_1 == [first, *others]


def large(folder):
    """Two GiB of bytes and float targets, which take no room on the disk."""
    for name, kind, shape in (("x", np.uint8, (2**19, 64, 64)), ("y", np.float32, (2**19, 1))):
        np.lib.format.open_memmap(folder / f"{name}_train.npy", "w+", kind, shape)
    return str(folder)


def memory(*kinds):
    """Memory of this process in MB, of some kinds."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kb = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    return sum(kb[kind] for kind in kinds) / 1024


def train_on_large(runtime, folder, workers, method):
    multiprocessing.set_start_method(method, force=True)
    before = memory("Private_Clean", "Private_Dirty"), memory("Rss")
    data = {"class_path": "ddp_sgd.data.Arrays", "init_args": {"path": str(folder)}}
    model = {"class_path": "ddp_sgd.models.MLP"}
    model["init_args"] = {"inputs": 64 * 64, "hidden": [], "classes": 1}
    transforms = [
        {"class_path": "ddp_sgd.data.augment.Normalize", "init_args": {"mean": 0, "std": 1}}
    ]
    config = RunConfig(
        output_dir=str(folder / f"runs{workers}"),
        model=model,
        loss={"class_path": "torch.nn.MSELoss"},
        data={
            "train": data,
            "eval": None,
            "batch_size": 64,
            "workers": workers,
            "train_transforms": transforms,
        },
        wandb={"mode": "disabled"},
    )
    stop = SimpleNamespace(reason=None)
    steps = iter(range(10))

    class Model(MLP):
        def forward(self, images):
            if next(steps, None) is None:
                stop.reason = "enough steps"
            return super().forward(images)

    result = fit(config, runtime, model=Model(**model["init_args"]), stop=stop)
    after = memory("Private_Clean", "Private_Dirty"), memory("Rss")
    return result.step, *(now - then for now, then in zip(after, before, strict=True))


@pytest.mark.parametrize(("workers", "method"), [(0, None), (1, "fork"), (1, "spawn")])
def test_two_ranks_share_an_array_of_two_gigabytes(tmp_path, workers, method):
    large(tmp_path)
    for step, private, resident in run_ranks(2, train_on_large, tmp_path, workers, method):
        assert step > 0
        assert private < 300
        assert resident < 1000  # the shared part is what the batches had, not the whole array
