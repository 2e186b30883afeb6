import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from saved_run import EPOCHS, files_of, flip_a_bit, plant_a_bomb, train, vouch_for

from ddp_sgd.checkpointing.convert import average_tensors, choose_checkpoints, write_average
from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors
from ddp_sgd.errors import ConfigError, DataError, OutputError
from ddp_sgd.report.journal import read_journal


def test_the_mean_is_that_of_numpy(run, tmp_path):
    chosen = choose_checkpoints([run])
    file = write_average(chosen, tmp_path / "mean")
    means = read_tensors(file)["model"]
    states = [read_tensors(path)["model"] for path in files_of(run)]
    assert list(means) == list(states[0])
    for name, mean in means.items():
        values = [state[name].numpy() for state in states]
        assert mean.dtype == states[0][name].dtype
        if values[0].dtype.kind == "f":
            total = sum((value.astype(np.float64) for value in values[1:]), np.float64(values[0]))
            expected = (total / 3).astype(np.float32)
        else:
            expected = values[-1]  # the count of batches
        np.testing.assert_array_equal(mean.numpy(), expected)
    assert read_tensors(file)["optimizer"] == {"momentum_buffer": {}}
    assert read_tensors(file)["mean_of"] == [str(path) for path in files_of(run)]


def test_the_header_is_the_newest_s_without_scores(run, tmp_path):
    file, manifest = find_checkpoint(
        write_average(choose_checkpoints([run], last=2), tmp_path / "mean")
    )
    newest = find_checkpoint(run)[1].header
    assert manifest.header.scores == {}
    assert not manifest.header.is_scored
    assert (manifest.header.step, manifest.header.plan) == (newest.step, newest.plan)
    assert len(read_tensors(file)["mean_of"]) == 2


@pytest.mark.parametrize("ending", [".pt", ".json"])
def test_one_that_cannot_be_read_is_not_left_out(ending, run, monkeypatch):
    """The mean would be another one, and nobody would know."""
    opened, forbidden = Path.open, files_of(run)[0].with_suffix(ending)

    def open_or_fail(path, *args, **options):
        if path == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_or_fail)
    with pytest.raises(DataError, match=f"{forbidden.name} cannot be read: Permission denied"):
        choose_checkpoints([run])


def test_a_run_goes_on_from_the_mean(run, tmp_path):
    write_average(choose_checkpoints([run]), tmp_path / "mean")
    more = {"resume": str(tmp_path / "mean"), "name": "more", "epochs": EPOCHS + 1}
    run_ranks(1, train, tmp_path, more)
    rows = read_journal(tmp_path / "more" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["event"] == "eval"] == [45, 60]


def test_a_damaged_one_is_passed_over_in_a_folder(run):
    first, second, third = files_of(run)
    flip_a_bit(second)
    assert [file for file, _ in choose_checkpoints([run], last=2)] == [first, third]
    with pytest.raises(DataError, match="is damaged"):
        choose_checkpoints([second, third])


def test_links_and_files_are_counted_once(run):
    first, _, third = files_of(run)
    chosen = choose_checkpoints([third, run / "checkpoints" / "last", first])
    assert [file for file, _ in chosen] == [first, third]


@pytest.mark.parametrize(
    ("names", "last", "error", "message"),
    [
        (["."], 1, ConfigError, "--last is 1; choose at least 2."),
        (["."], 4, DataError, "holds 3 whole checkpoints, while 4 are needed; "),
        (["checkpoints/last"], None, DataError, "holds 1 whole checkpoints, while 2 are needed"),
        (["checkpoints/nothing.pt"], None, DataError, "is not there"),
    ],
)
def test_too_few_are_refused(run, names, last, error, message):
    with pytest.raises(error, match=message):
        choose_checkpoints([run / name for name in names], last=last)


def test_nothing_is_overwritten(run, tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(OutputError, match="taken is there already; choose another --output."):
        write_average(choose_checkpoints([run]), tmp_path / "taken")
    with pytest.raises(OutputError, match="cannot be written: (Not a directory|File exists)"):
        write_average(choose_checkpoints([run]), tmp_path / "taken" / "below")


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddp_sgd.checkpointing.convert.write_checkpoint", full)
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        write_average(choose_checkpoints([run]), tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_another_model_is_refused(run, tmp_path):
    first, *_ = files_of(run)
    content = torch.load(first, weights_only=True)
    name, weight = next(iter(content["model"].items()))
    content["model"][name] = weight[:1]
    torch.save(content, first)
    vouch_for(first)
    with pytest.raises(DataError, match=f"is of another model than the newest: {name} was"):
        write_average(choose_checkpoints([run]), tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_tensors_that_are_one_stay_one(run):
    for file in files_of(run):
        content = torch.load(file, weights_only=True)
        weight = next(iter(content["model"].values()))
        content["model"] |= {"tied": weight, "note": "text"}
        torch.save(content, file)
        vouch_for(file)
    model = average_tensors(choose_checkpoints([run]))["model"]
    assert model["tied"].data_ptr() == next(iter(model.values())).data_ptr()
    assert model["note"] == "text"


def test_a_bomb_does_not_go_off(run, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    plant_a_bomb(files_of(run)[0], tmp_path / "trace")
    with pytest.raises(DataError, match="holds more than tensors and plain data"):
        average_tensors(choose_checkpoints([run]))
    assert not (tmp_path / "trace").exists()
