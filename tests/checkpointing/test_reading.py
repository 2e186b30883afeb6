import builtins
import errno
import hashlib
import io
import json
import os
import pickle
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from saving import write

from ddp_sgd import files
from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors
from ddp_sgd.checkpointing.store import CheckpointFolder, read_manifest
from ddp_sgd.errors import DataError, ExitCode


@pytest.fixture
def folder(tmp_path):
    """A run that was saved at the steps 10 and 20."""
    (tmp_path / "run").mkdir()
    for step in (10, 20):
        write(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run" / "checkpoints"


def refused(read, path, match):
    with pytest.raises(DataError, match=match) as caught:
        read(path)
    assert caught.value.exit_code == ExitCode.DATA == 65
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_written_is_read(folder):
    content = read_tensors(folder / "step-00000010.pt")
    assert content["cursor"] == {"epoch": 1, "position": 0, "step": 10, "samples": 100}
    assert torch.equal(content["model"]["weight"], torch.full((64,), 10.0))


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("run", 20),
        ("run/checkpoints", 20),
        ("run/checkpoints/last", 20),
        ("run/checkpoints/step-00000010.pt", 10),
        ("link", 20),
    ],
)
def test_a_checkpoint_a_link_and_a_folder_are_found(name, step, folder, tmp_path):
    (tmp_path / "link").symlink_to("run")
    file, manifest = find_checkpoint(tmp_path / name)
    assert (file.name, manifest.header.step) == (f"step-000000{step}.pt", step)
    assert read_tensors(file)["cursor"]["step"] == step


def test_where_there_is_none_that_is_said(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    refused(
        find_checkpoint, tmp_path / "nowhere", "is not there; name a checkpoint or a run folder"
    )
    refused(find_checkpoint, tmp_path / "dangling", "is not there")
    refused(find_checkpoint, tmp_path / "circle", "is not there")
    refused(find_checkpoint, tmp_path / ("x" * 300), "cannot be read: File name too long")
    refused(find_checkpoint, tmp_path / "empty", r"is whole \(nothing was saved in it\)")
    torch.save({}, tmp_path / "foreign.pt")
    refused(find_checkpoint, tmp_path / "foreign.pt", "no valid manifest foreign.json beside it")
    for file in folder.glob("step-*.pt"):
        os.truncate(file, 100)
    refused(find_checkpoint, folder, r"whole \(step-00000020.pt has 100 bytes instead of .*10.pt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no checkpoint",
        b"PK\3\4" + bytes(100),
        b"\x80\x02.",
        b"\x80\x02h\x07.",
        b"\x80\x02}q\x00(ee.",
        pickle.dumps({"format": 1}, protocol=4)[:-3],
        bytes(range(256)),
    ],
)
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "x.pt").write_bytes(content)
    refused(read_tensors, tmp_path / "x.pt", "x.pt ")


def test_where_nobody_compared_checksums_noise_gives_no_other_error(folder):
    """It may hit a text, which is read changed then: that is what the checksum is for."""
    file = folder / "step-00000010.pt"
    good = file.read_bytes()
    for length in range(0, len(good), 97):
        file.write_bytes(good[:length])
        refused(read_tensors, file, "step-00000010.pt ")
    start = good.index(b"\x80\x02")  # the pickle
    for at in range(start, start + 400, 3):
        file.write_bytes(good[:at] + b"\xff" + good[at + 1 :])
        with suppress(DataError):
            read_tensors(file)


@pytest.mark.parametrize("content", [{"format": 2}, {}, [1, 2], torch.zeros(2)])
def test_a_file_of_another_format_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    refused(
        read_tensors, tmp_path / "x.pt", "is no checkpoint of format 1; name a file that ddp_sgd"
    )


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    refused(read_tensors, tmp_path / "nowhere", "is no checkpoint that can be read: .*No such file")
    refused(read_tensors, tmp_path, "is no checkpoint that can be read: .*Is a directory")


class Failing(io.FileIO):
    """A file whose reads fail, all or the first: the handle of an NFS client went stale."""

    failures = 0

    def readinto(self, buffer):
        self._fail()
        return super().readinto(buffer)

    def read(self, size=-1):
        self._fail()
        return super().read(size)

    def _fail(self):
        if Failing.failures > 0:
            Failing.failures -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


@pytest.fixture
def failing(monkeypatch):
    """Let the first so many reads of a file fail."""
    real = builtins.open

    def install(file, failures):
        Failing.failures = failures
        monkeypatch.setattr(files, "sleep", lambda pause: None)
        monkeypatch.setattr(
            builtins,
            "open",
            lambda path, *args, **options: (
                Failing(path) if path == file else real(path, *args, **options)
            ),
        )

    return install


def test_a_read_of_tensors_that_fails_for_a_moment_is_repeated(folder, failing):
    file = folder / "step-00000010.pt"
    failing(file, 3)
    assert read_tensors(file)["cursor"]["step"] == 10
    assert Failing.failures == 0


def test_a_read_of_tensors_that_fails_for_good_is_no_word_about_the_file(folder, failing):
    file = folder / "step-00000010.pt"
    failing(file, 10**9)
    refused(
        read_tensors,
        file,
        "step-00000010.pt cannot be read: Stale file handle; try again when its disk answers, or "
        "name another checkpoint.",
    )


class Bomb:
    """Makes a folder when it is unpickled: what an attacker would do, and worse."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def plant(file, trace, *, legacy=False):
    """Put a bomb among the weights, and make the manifest fit."""
    content = read_tensors(file)
    content["model"]["weight"] = Bomb(trace)
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    data = file.read_bytes()
    manifest = replace(
        read_manifest(file.with_suffix(".json")),
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    file.with_suffix(".json").write_text(manifest.to_text())


READ = """
import sys
from pathlib import Path
from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors
from ddp_sgd.errors import UserError
try:
    read_tensors(find_checkpoint(Path(sys.argv[1]))[0])
except UserError as error:
    print(error)
    sys.exit(int(error.exit_code))
"""


@pytest.mark.parametrize("legacy", [False, True])
def test_a_bomb_does_not_go_off(legacy, folder, tmp_path):
    file = folder / "step-00000020.pt"
    plant(file, tmp_path / "trace", legacy=legacy)
    assert CheckpointFolder(folder).choose().manifest.file == file.name  # the checksum fits
    refused(read_tensors, file, "holds more than tensors and plain data, and is not read; name")
    assert not (tmp_path / "trace").exists()
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        torch.load(file, weights_only=True)
    torch.load(file, weights_only=False)
    assert (tmp_path / "trace").exists()  # it is a real one


def test_a_bomb_does_not_go_off_whatever_the_environment_says(folder, tmp_path, monkeypatch):
    plant(folder / "step-00000020.pt", tmp_path / "trace")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    ended = subprocess.run(
        [sys.executable, "-c", READ, str(folder)], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (65, "")
    assert ended.stdout.count("\n") == 1
    assert "holds more than tensors and plain data" in ended.stdout
    refused(read_tensors, folder / "step-00000020.pt", "holds more than tensors")
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")  # torch refuses to have both
    refused(read_tensors, folder / "step-00000020.pt", "is no checkpoint that can be read")
    assert not (tmp_path / "trace").exists()


def test_a_manifest_does_not_lead_out_of_its_folder(folder, tmp_path):
    """Not even one whose own checksum fits."""
    precious = tmp_path / "step-00000010.pt"
    precious.write_text("precious")
    manifest = read_manifest(folder / "step-00000010.json")
    outwards = replace(manifest, file="../../step-00000010.pt")
    (folder / "step-00000010.json").write_text(outwards.to_text())
    assert json.loads((folder / "step-00000010.json").read_text())["file"].startswith("..")
    refused(find_checkpoint, folder / "step-00000010.pt", "no valid manifest")
    CheckpointFolder(folder).settle(keep=1)
    assert precious.exists()
