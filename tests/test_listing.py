import errno
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import run_ranks
from saved_run import cut_short, files_of, flip_a_bit, train

from ddp_sgd.checkpoint import (
    fault_at,
    files_to_verify,
    list_checkpoints,
    listing_lines,
)
from ddp_sgd.errors import DataError


def test_a_run_is_listed_from_the_oldest_to_the_newest(run):
    found = list_checkpoints(run)
    assert [entry.file.name for entry in found] == [file.name for file in files_of(run)]
    assert [entry.manifest.header.step for entry in found] == [15, 30, 45]
    assert "last" in found[-1].remark
    assert sum("best" in entry.remark for entry in found) == 1
    assert list_checkpoints(run / "checkpoints") == found


def test_the_table_has_a_line_for_each(run):
    found = list_checkpoints(run)
    head, *lines = listing_lines(found, now=found[0].manifest.time + 7200)
    assert head.split() == ["checkpoint", "step", "epoch", "samples", "ranks", "MB", "age", "score"]
    scores = found[0].manifest.header.scores
    assert lines[0].split()[:5] == ["step-00000015.pt", "15", "1", "1,437", "1"]
    assert lines[0].split()[6:10] == ["2", "h", f"{100 * scores['eval/accuracy']:.2f}", "%"]


@pytest.mark.parametrize(
    ("age", "shown"), [(-3, "0 s"), (59, "59 s"), (60, "1 min"), (7200, "2 h"), (90_000, "1 d")]
)
def test_ages_are_short(run, age, shown):
    entry = list_checkpoints(run)[-1]
    assert f"  {shown}  " in listing_lines([entry], now=entry.manifest.time + age)[1]


def test_what_is_damaged_shows_without_reading_it(run):
    first, second, third = files_of(run)
    cut_short(first)
    second.with_suffix(".json").unlink()
    third.rename(third.with_suffix(".pt.damaged"))
    third.with_suffix(".json").unlink()
    third.with_suffix(".pt.damaged.2").write_text("another")
    remarks = {entry.file.name: entry.remark for entry in list_checkpoints(run)}
    size = first.stat().st_size
    assert remarks.pop(first.name).startswith(f"damaged: {size} bytes instead of {size + 100}")
    assert list(remarks.values()) == ["no valid manifest", "set aside", "set aside"]
    lines = listing_lines(list_checkpoints(run), now=0.0)
    assert lines[-1].endswith("set aside")


def test_a_manifest_of_another_file_is_none(run):
    first, second, _ = files_of(run)
    shutil.copyfile(first.with_suffix(".json"), second.with_suffix(".json"))
    assert "has no valid manifest" in fault_at(second)


def test_every_byte_counts(run):
    first, second, third = files_of(run)
    flip_a_bit(first)
    cut_short(second)
    assert fault_at(first) == "is damaged: its SHA-256 is not that of the manifest"
    assert "bytes instead of" in fault_at(second)
    assert fault_at(third) is None
    assert fault_at(run / "checkpoints" / "last") is None
    assert fault_at(run / "nothing.pt") == "is not there"
    assert "has no valid manifest" in fault_at(run / "result.json")


@pytest.mark.parametrize("ending", [".pt", ".json"])
def test_what_cannot_be_read_is_not_called_damaged(ending, run, monkeypatch):
    first, second, _ = files_of(run)
    opened = Path.open

    def open_or_fail(path, *args, **options):
        if path == first.with_suffix(ending):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_or_fail)
    assert fault_at(first) == "cannot be read: Permission denied"
    assert fault_at(second) is None
    if ending == ".json":
        remarks = {entry.file.name: entry.remark for entry in list_checkpoints(run)}
        assert remarks[first.name] == "cannot be read: Permission denied"
        assert remarks[second.name] in ("", "best")


def test_a_folder_stands_for_all_in_it(run):
    assert files_to_verify(run) == files_of(run)
    assert files_to_verify(run / "checkpoints" / "last") == [run / "checkpoints" / "last"]


def test_a_folder_that_is_not_there_is_named(run):
    for path in (run / "nothing", run / "result.json"):
        with pytest.raises(DataError, match=r"is no folder that can be read \(N.*name a run"):
            list_checkpoints(path)


def test_epochs_are_a_real_number(run):
    headers = [entry.manifest.header for entry in list_checkpoints(run)]
    assert [header.epochs for header in headers] == [1.0, 2.0, 3.0]


def test_a_run_without_accuracy_shows_its_loss(tmp_path):
    mlp = {"class_path": "ddp_sgd.models.MLP"}
    changes = {"epochs": 1, "data": {"batch_size": 100, "eval": None}}
    changes["model"] = mlp | {"init_args": {"inputs": 64, "hidden": [], "classes": 10}}
    run_ranks(1, train, tmp_path, changes)
    (entry,) = list_checkpoints(tmp_path / "tiny")
    assert listing_lines([entry], now=entry.manifest.time)[1].split()[-2:] == ["-", "last"]
    header = replace(entry.manifest.header, scored_at=15, scores={"eval/loss": 0.25})
    entry = replace(entry, manifest=replace(entry.manifest, header=header))
    assert "loss 0.2500" in listing_lines([entry], now=0.0)[1]
