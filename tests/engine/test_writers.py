"""Checkpoints that a process writes, and who writes which."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from saved_training import Training, save_steps
from saving import fill, header, names, small_disk, tensors

from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.checkpointing.reading import read_tensors
from ddp_sgd.checkpointing.writer_process import Packed, _write
from ddp_sgd.engine import writers as module
from ddp_sgd.engine.writers import SMALL_BYTES, ProcessWriter, ThreadWriter, build_writer
from ddp_sgd.errors import OutputError

CPU = torch.device("cpu")
FLOATS = torch.float32.itemsize


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints")


@pytest.fixture
def training(folder):
    return Training(folder.path)


def open_process(folder, keep=3, before=lambda: None):
    return closing(ProcessWriter(folder, CPU, keep=keep, before=before))


@pytest.mark.parametrize(
    ("device", "size", "kind"),
    [
        ("cpu", SMALL_BYTES // FLOATS // 2, ProcessWriter),
        ("cpu", SMALL_BYTES // FLOATS // 2 + 1, ThreadWriter),
        ("cuda", 1, ThreadWriter),
    ],
)
def test_a_process_writes_what_is_small_and_on_the_host(device, size, kind, folder):
    writer = build_writer(
        tensors(0, size) if device == "cpu" else {},  # to reserve memory for
        folder=folder,
        device=torch.device(device),
        keep=3,
        before=lambda: None,
    )
    with closing(writer):
        assert type(writer) is kind


def test_both_ways_write_the_same_bytes(tmp_path):
    written = []
    for way in (ProcessWriter, ThreadWriter):
        folder = CheckpointFolder(tmp_path / way.__name__)
        options = {"tensors": tensors(1)} if way is ThreadWriter else {}
        with closing(way(folder, CPU, keep=3, before=lambda: None, **options)) as writer:
            writer.begin(header(1), tensors(1))
            manifest = writer.wait().manifest
        assert names(folder.path) == {"step-00000001.pt", "step-00000001.json", "last"}
        written.append((folder.path / manifest.file).read_bytes())
    assert written[0] == written[1]


def test_what_is_saved_is_the_moment_of_the_save_several_at_once(training):
    weights = []
    with training.open(keep=9, writer="ProcessWriter") as checkpoints:
        training.step()
        checkpoints.save(training.state, {})
        checkpoints.finish()
        os.kill(checkpoints._writer._process.pid, signal.SIGSTOP)
        for _ in range(3):  # none of them is written before the last has begun
            weights.append(training.model.weight.tolist())
            training.step()
            checkpoints.save(training.state, {})
        assert [step for step, _ in training.told] == [1]
        os.kill(checkpoints._writer._process.pid, signal.SIGCONT)
        checkpoints.finish()
    assert [(step, row["file"]) for step, row in training.told] == [
        (step, f"step-{step:08d}.pt") for step in (1, 2, 3, 4)
    ]
    for step, weight in enumerate(weights, start=1):
        saved = read_tensors(training.folder / f"step-{step:08d}.pt")
        assert saved["cursor"]["step"] == step
        assert saved["model"]["weight"].tolist() == weight
    assert training.saved()["cursor"]["step"] == 4


def test_a_save_waits_while_too_many_are_on_their_way(training, monkeypatch):
    monkeypatch.setattr(ProcessWriter, "at_once", 2)
    with training.open(writer="ProcessWriter") as checkpoints:
        for expected in (0, 0, 1, 2):
            training.step()
            checkpoints._writer.is_over = lambda: False  # nobody asks
            checkpoints.save(training.state, {})
            assert len(training.told) == expected
        checkpoints.finish()
    assert [step for step, _ in training.told] == [1, 2, 3, 4]


def test_rows_come_before_the_checkpoint_that_they_belong_to(training):
    with training.open(writer="ProcessWriter") as checkpoints:
        save_steps(training, checkpoints, 2)
        checkpoints.finish()
    files = [[file.name for file in files] for files in training.files_before]
    assert files == [[], ["step-00000001.json", "step-00000001.pt"]]


def test_only_what_is_kept_stays(folder):
    with open_process(folder, keep=2) as writer:
        for step in range(1, 6):
            writer.begin(header(step), tensors(step))
        manifests = [writer.wait().manifest for _ in range(5)]
    assert [manifest.header.step for manifest in manifests] == [1, 2, 3, 4, 5]
    assert [entry.header.step for entry in folder.manifests()] == [4, 5]


def test_a_full_disk_costs_no_checkpoint_and_room_mends_it(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        training = Training(disk / "checkpoints", size=10_000)
        with training.open(writer="ProcessWriter") as checkpoints:
            save_steps(training, checkpoints, 1)
            whole = names(training.folder)
            ballast = fill(disk)
            save_steps(training, checkpoints, 2)
            assert training.told[-1] == (3, {"error": "not written: No space left on device"})
            assert names(training.folder) == whole
            ballast.unlink()
            save_steps(training, checkpoints, 1)
            checkpoints.finish()
            assert training.saved()["cursor"]["step"] == 4
            fill(disk)
            save_steps(training, checkpoints, 2)
            with pytest.raises(OutputError, match="3 times in a row: No space left on device"):
                save_steps(training, checkpoints, 1)
        assert training.saved()["cursor"]["step"] == 4


def test_a_process_that_is_killed_costs_what_was_on_its_way_and_another_follows(training):
    with training.open(keep=9, writer="ProcessWriter") as checkpoints:
        save_steps(training, checkpoints, 1)
        process = checkpoints._writer._process
        process.send_signal(signal.SIGSTOP)
        for _ in range(4):  # more than may fail in a row, each by itself
            training.step()
            checkpoints.save(training.state, {})
        process.kill()
        process.wait()
        training.step()
        checkpoints.save(training.state, {})
        checkpoints.finish()
    lost = {"error": "not written: the process that writes it ended with code -9"}
    assert training.told[1:5] == [(step, lost) for step in (2, 3, 4, 5)]
    assert training.told[5][1]["file"] == "step-00000006.pt"
    assert training.saved()["cursor"]["step"] == 6


def test_a_process_that_cannot_be_started_is_told(training, monkeypatch):
    def refuse(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with training.open(writer="ProcessWriter") as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(module, "start_companion", refuse)
            save_steps(training, checkpoints, 1)
        save_steps(training, checkpoints, 1)
    assert training.told[0][1] == {"error": "not written: Resource temporarily unavailable"}
    assert training.saved()["cursor"]["step"] == 2


def test_a_state_that_cannot_be_packed_is_told_and_harms_no_other(folder):
    with open_process(folder) as writer:
        writer.begin(header(1), tensors(1))
        writer.begin(header(2), {"model": {"odd": lambda: 0}})
        writer.begin(header(3), tensors(3))
        assert writer.wait().manifest.header.step == 1
        with pytest.raises(Exception, match="pickle"):
            writer.wait()
        assert writer.wait().manifest.header.step == 3


def test_a_failure_that_does_not_travel_is_told_by_its_name(folder):
    class Broken(CheckpointFolder):
        def name_for(self, header):
            raise KeyError(header.step)

    answer = _write(Broken(folder.path), Packed(header(7), b""), 3)
    assert (type(answer), str(answer)) == (RuntimeError, "KeyError: 7")


def test_nothing_comes_of_nothing(folder):
    with open_process(folder) as writer:
        assert isinstance(writer._read_answer(), RuntimeError)
    with closing(ThreadWriter(folder, CPU, keep=1, before=int, tensors={})) as writer:
        assert writer.is_over()
        with pytest.raises(RuntimeError, match="nothing was begun"):
            writer.wait()


def test_leaving_waits_for_what_is_on_its_way(folder):
    with open_process(folder) as writer:
        for step in (1, 2):
            writer.begin(header(step), tensors(step))
        pid = writer._process.pid
    assert folder.choose().manifest.header.step == 2
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_pipe_that_stays_small_takes_a_large_state_all_the_same(folder, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(module.fcntl, "fcntl", refuse)
    size = SMALL_BYTES // FLOATS // 2
    with open_process(folder) as writer:
        for step in (1, 2):
            writer.begin(header(step), tensors(step, size))
        for step in (1, 2):
            manifest = writer.wait().manifest
            saved = read_tensors(folder.path / manifest.file)
            assert saved["model"]["weight"].tolist() == [float(step)] * size


def test_what_a_terminal_sends_to_all_ends_no_save(folder):
    with open_process(folder) as writer:
        for step, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), start=1):
            writer.begin(header(step), tensors(step))
            writer._process.send_signal(number)
            assert writer.wait().manifest.header.step == step


RANK = """
import sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from saving import header, tensors
from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.engine.writers import ProcessWriter

writer = ProcessWriter(
    CheckpointFolder(Path(sys.argv[1])), torch.device("cpu"), keep=3, before=lambda: None
)
writer.begin(header(1), tensors(1))
writer.wait()
print(writer._process.pid, flush=True)
sys.stdin.readline()
for step in range(2, 6):
    writer.begin(header(step), tensors(step))
print("begun", flush=True)
time.sleep(600)
"""


def test_a_rank_that_is_killed_takes_its_writer_along(folder):
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, folder.path, Path(__file__).parents[1]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with rank:
        writer = int(rank.stdout.readline())
        os.kill(writer, signal.SIGSTOP)
        rank.stdin.write("\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "begun\n"
        rank.kill()
    os.kill(writer, signal.SIGCONT)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{writer}/stat").exists() and _is_running(writer):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    folder.clean_up()
    choice = folder.choose()
    assert choice.passed_over == ()
    assert choice.manifest.header.step >= 1


def _is_running(pid):
    """Whether a process is more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
