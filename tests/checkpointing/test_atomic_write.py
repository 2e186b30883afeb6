import errno
import hashlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import commands
import pytest
import torch
from limits import WAIT_S
from saving import fill, flip, names, small_disk, write

from ddp_sgd.checkpointing import serialization
from ddp_sgd.checkpointing.serialization import read_tensors
from ddp_sgd.checkpointing.store import CheckpointFolder

PROGRAM = Path(__file__).parents[1] / "saving.py"


def chosen_step(folder):
    return CheckpointFolder(folder).choose().manifest.header.step


class Saving:
    """A program that forks processes, each of which saves again and again."""

    def __init__(self, folder, size):
        self._server = commands.Popen(
            [sys.executable, str(PROGRAM), str(folder), str(size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[1])},
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.communicate(timeout=WAIT_S)

    def kill_at(self, first_step, saves, moment_s):
        """Kill a process that saves, so long after it began a save.

        Returns the last step whose save had ended, the last that had begun, and how long saves
        took.
        """
        self._server.stdin.write(f"{first_step}\n".encode())
        self._server.stdin.flush()
        pid, saved, began, seconds = None, None, None, []
        for line in self._server.stdout:
            words = json.loads(line)
            pid = words.get("pid", pid)
            saved = words.get("saved", saved)
            began = words.get("began", began)
            if "seconds" in words:
                seconds.append(words["seconds"])
            if "ended" in words:
                return saved, began, seconds
            if pid and began == first_step + saves:
                time.sleep(moment_s)  # not to wait for anything: this is the random moment
                os.kill(pid, 9)
                saves = -1
        raise EOFError


def test_of_50_saves_that_are_killed_none_leaves_less_than_there_was(tmp_path):
    place, size = random.Random(0), 250_000  # 2 MB a file
    folder = tmp_path / "checkpoints"
    saved = CheckpointFolder(folder)
    last, save_s, left_behind = 0, 0.1, 0
    with Saving(folder, size) as saving:
        for kill in range(50):
            first = last + 1
            moment_s = place.uniform(0, 1.1) * save_s
            ended, began, seconds = saving.kill_at(first, 1 if kill < 2 else 0, moment_s)
            save_s = min([save_s, *seconds]) if kill > 1 else min(seconds)
            before = names(folder)
            saved.clean_up()
            left_behind += names(folder) != before
            choice = saved.choose()
            assert choice.passed_over == ()
            last = choice.manifest.header.step
            assert (ended or first - 1) <= last <= began
            content = read_tensors(folder / choice.manifest.file)
            assert content["cursor"]["step"] == last
            assert torch.equal(content["model"]["weight"], torch.full((size,), float(last)))
            kept = {name.removesuffix(".pt") for name in names(folder) if name.endswith(".pt")}
            assert names(folder) - {"last", "best"} == {
                f"{name}.{ending}" for name in kept for ending in ("pt", "json")
            }
    assert left_behind >= 15  # the moments were in the midst of things
    write(folder, last + 1, keep=1)
    assert chosen_step(folder) == last + 1
    assert len(saved.manifests()) <= 2


def damage(file):
    """Stand in for a disk that returns something else than it was given."""
    flip(file, 8 * 200)


def test_nothing_goes_before_the_new_one_was_read_back(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(serialization, "_forget_cached", damage)
        with pytest.raises(OSError, match="what was written is damaged: its SHA-256") as caught:
            write(tmp_path, 3, keep=1)
    assert caught.value.errno == errno.EIO
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(tmp_path, 3, keep=1)
    assert names(tmp_path) == {"step-00000003.pt", "step-00000003.json", "last"}


@pytest.fixture
def disk(tmp_path):
    """A disk of 2 MiB that holds a checkpoint of 1 MB."""
    with small_disk(tmp_path / "disk", "2m") as disk:
        write(disk, 1, size=125_000)
        yield disk


def save_too_much(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OSError, match="No space left on device|File too large") as caught:
        write(folder, 2, size=250_000, keep=1)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert chosen_step(folder) == 1
    return caught.value.errno


def test_a_full_disk_shows_before_anything_is_written(disk, monkeypatch):
    monkeypatch.setattr(serialization._Hashed, "write", None)  # it is not called
    assert save_too_much(disk) == errno.ENOSPC


def test_a_disk_that_fills_up_while_it_is_written_to(disk, monkeypatch):
    """As on file systems that cannot reserve room."""
    monkeypatch.setattr(serialization, "_room_for", lambda _: 1)
    assert save_too_much(disk) == errno.ENOSPC
    write(disk, 2, size=100_000, keep=1)
    assert chosen_step(disk) == 2


def test_a_disk_with_room_for_all_but_the_manifest(disk, monkeypatch, tmp_path):
    needed = write(tmp_path / "elsewhere", 2, size=50_000).size_bytes
    ballast = fill(disk, leaving=needed)
    monkeypatch.setattr(serialization, "_room_for", lambda _: 1)
    before = names(disk)
    with pytest.raises(OSError, match="No space left on device"):
        write(disk, 2, size=50_000)
    assert names(disk) == before
    assert chosen_step(disk) == 1
    ballast.unlink()
    write(disk, 2, size=50_000)
    assert chosen_step(disk) == 2


@pytest.mark.parametrize("reserving", [True, False])
def test_a_limit_on_the_length_of_files(reserving, tmp_path, monkeypatch):
    write(tmp_path, 1)
    if not reserving:
        monkeypatch.setattr(serialization, "_room_for", lambda _: 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        assert save_too_much(tmp_path) == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_less_at_once_than_it_is_given():
    """As every disk does beyond 2 GiB."""

    class Sipping(io.BytesIO):
        def write(self, data):
            return super().write(data[:3])

    raw = Sipping()
    stream = serialization._Hashed(raw)
    assert stream.write(b"0123456789") == stream.size == 10
    assert raw.getvalue() == b"0123456789"
    assert stream.digest.hexdigest() == hashlib.sha256(b"0123456789").hexdigest()


def test_a_file_system_that_cannot_reserve_room_does_without(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    write(tmp_path, 1)
    assert chosen_step(tmp_path) == 1


def test_a_place_that_cannot_be_written_to(tmp_path):
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "no" / "where", 1)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        write(tmp_path / "file", 1)


def test_a_save_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    write(tmp_path, 1)
    before = names(tmp_path)
    monkeypatch.setattr(serialization, "_forget_cached", interrupt)
    with suppress(KeyboardInterrupt):
        write(tmp_path, 2)
    assert names(tmp_path) == before


def test_both_files_are_on_the_disk_before_they_take_their_names(tmp_path, monkeypatch):
    """What a power cut would show; done in this order and no other."""
    done = []
    sync, replace = os.fsync, Path.replace

    def note_sync(descriptor):
        done.append(("synced", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        sync(descriptor)

    def note_replace(self, target):
        done.append(("named", Path(target).name))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_replace)
    write(tmp_path, 1)
    assert done == [
        ("synced", ".step-00000001.pt.new"),
        ("synced", ".step-00000001.json.new"),
        ("named", "step-00000001.json"),
        ("named", "step-00000001.pt"),
        ("synced", tmp_path.name),
        ("named", "last"),
    ]
