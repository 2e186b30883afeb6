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
from limits import WAIT_S
from saved_training import Training, save_steps
from saving import header, names, tensors

from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.checkpointing.reading import read_tensors
from ddp_sgd.checkpointing.writer_process import Packed, _write
from ddp_sgd.distributed.cpus import batch_scheduling
from ddp_sgd.engine import writers as module
from ddp_sgd.engine.writers import SMALL_BYTES, ProcessWriter, ThreadWriter, build_writer

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


def pid_of(writer):
    return writer._process.process.pid


def until(is_so):
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)


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


def test_a_copy_for_which_there_is_no_memory_is_a_failed_save(folder):
    huge = {"model": {"x": torch.zeros(1).expand(2**45)}}
    with closing(ThreadWriter(folder, CPU, keep=3, before=lambda: None, tensors=huge)) as writer:
        writer.begin(header(1), huge)
        assert writer.is_over()
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            writer.wait()
        writer.begin(header(2), tensors(2))
        assert writer.wait().file == "step-00000002.pt"


def test_both_ways_write_the_same_bytes(tmp_path):
    written = []
    for way in (ProcessWriter, ThreadWriter):
        folder = CheckpointFolder(tmp_path / way.__name__)
        options = {"tensors": tensors(1)} if way is ThreadWriter else {}
        with closing(way(folder, CPU, keep=3, before=lambda: None, **options)) as writer:
            writer.begin(header(1), tensors(1))
            file = writer.wait().file
        assert names(folder.path) == {"step-00000001.pt", "step-00000001.json", "last"}
        written.append((folder.path / file).read_bytes())
    assert written[0] == written[1]


def test_what_is_saved_is_the_moment_of_the_save_two_at_once(training):
    weights = []
    with training.open(keep=9, writer="ProcessWriter") as checkpoints:
        save_steps(training, checkpoints, 1)
        os.kill(pid_of(checkpoints._writer), signal.SIGSTOP)
        for _ in range(2):  # neither is written before the second has begun
            training.step()
            weights.append(training.model.weight.tolist())
            checkpoints.save(training.state, {})
        training.step()
        assert [step for step, _ in training.told] == [1]
        os.kill(pid_of(checkpoints._writer), signal.SIGCONT)
        until((training.folder / "step-00000003.json").exists)
        until(checkpoints._writer.is_over)
        checkpoints.finish()
    assert [(step, row["file"]) for step, row in training.told] == [
        (step, f"step-{step:08d}.pt") for step in (1, 2, 3)
    ]
    for step, weight in enumerate(weights, start=2):
        saved = read_tensors(training.folder / f"step-{step:08d}.pt")
        assert saved["cursor"]["step"] == step
        assert saved["model"]["weight"].tolist() == weight


def test_all_that_is_written_is_reported_at_once(training):
    with training.open(writer="ProcessWriter") as checkpoints:
        for _ in range(2):
            training.step()
            checkpoints.save(training.state, {})
        checkpoints._writer._process.send(None)  # it is done with both when it ends
        checkpoints._writer._process.process.wait()
        checkpoints.poll()
        assert [step for step, _ in training.told] == [1, 2]


def test_a_third_save_waits_for_the_first(training):
    with training.open(writer="ProcessWriter") as checkpoints:
        checkpoints.poll = lambda: None  # nobody asks
        for expected in (0, 0, 1, 2):
            training.step()
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
        files = [writer.wait().file for _ in range(5)]
    assert files == [f"step-{step:08d}.pt" for step in range(1, 6)]
    assert [entry.header.step for entry in folder.manifests()] == [4, 5]


def test_a_process_that_is_killed_costs_what_was_on_its_way_and_another_follows(training):
    with training.open(keep=9, writer="ProcessWriter") as checkpoints:
        save_steps(training, checkpoints, 1)
        process = checkpoints._writer._process.process
        process.send_signal(signal.SIGSTOP)
        for _ in range(2):
            training.step()
            checkpoints.save(training.state, {})
        process.kill()
        process.wait()
        training.step()
        checkpoints.save(training.state, {})
        checkpoints.finish()
    lost = {"error": "not written: the process that writes it ended with code -9"}
    assert training.told[1:3] == [(step, lost) for step in (2, 3)]
    assert training.told[3][1]["file"] == "step-00000004.pt"
    assert training.saved()["cursor"]["step"] == 4


def test_what_a_process_wrote_before_it_was_killed_counts(training):
    with training.open(writer="ProcessWriter") as checkpoints:
        training.step()
        checkpoints.save(training.state, {})
        until(checkpoints._writer.is_over)
        checkpoints._writer._process.process.kill()
        checkpoints._writer._process.process.wait()
        checkpoints._writer.begin(header(2), tensors(2))  # finds nobody
        checkpoints.finish()
        with pytest.raises(OSError, match="Broken pipe"):
            checkpoints._writer.wait()
    assert training.told[0][1]["file"] == "step-00000001.pt"


def test_an_interrupt_in_the_midst_of_a_message_ends_the_process(folder, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    with open_process(folder) as writer:
        writer.begin(header(1), tensors(1))
        writer.wait()
        pid = pid_of(writer)
        monkeypatch.setattr(writer._process._messages, "send", interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.begin(header(2), tensors(2))
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        writer.begin(header(3), tensors(3))
        assert writer.wait().file == "step-00000003.pt"


def test_a_fork_has_no_part_in_it(folder):
    with open_process(folder) as writer:
        writer.begin(header(1), tensors(1))
        fork = os.fork()
        if fork == 0:
            writer.close()
            os._exit(0)
        assert os.waitpid(fork, 0)[1] == 0
        assert writer.wait().file == "step-00000001.pt"
        writer.begin(header(2), tensors(2))
        assert writer.wait().file == "step-00000002.pt"


def test_a_process_that_cannot_be_started_is_told(training, monkeypatch):
    def refuse(*_, **options):
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
        pid = pid_of(writer)
        assert writer.wait().file == "step-00000001.pt"
        with pytest.raises(Exception, match="pickle"):
            writer.wait()
        assert writer.wait().file == "step-00000003.pt"
        assert pid_of(writer) == pid


def test_a_failure_that_does_not_travel_is_reported_by_its_name(folder):
    class Broken(CheckpointFolder):
        def name_for(self, header):
            raise KeyError(header.step)

    answer = _write(Broken(folder.path), Packed(header(7), b""), 3)
    assert (type(answer), str(answer)) == (RuntimeError, "KeyError: 7")


def test_nothing_comes_of_nothing(folder):
    with closing(ThreadWriter(folder, CPU, keep=1, before=int, tensors={})) as writer:
        assert writer.is_over()
        with pytest.raises(RuntimeError, match="nothing was begun"):
            writer.wait()


def test_leaving_waits_for_what_is_on_its_way(folder):
    with open_process(folder) as writer:
        for step in (1, 2):
            writer.begin(header(step), tensors(step))
        pid = pid_of(writer)
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
            saved = read_tensors(folder.path / writer.wait().file)
            assert saved["model"]["weight"].tolist() == [float(step)] * size


def test_what_a_terminal_sends_to_all_ends_no_save(folder):
    with open_process(folder) as writer:
        for step, number in enumerate((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), start=1):
            writer.begin(header(step), tensors(step))
            os.kill(pid_of(writer), number)
            assert writer.wait().file == f"step-{step:08d}.pt"


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
print(writer._process.process.pid, flush=True)
sys.stdin.readline()
for step in range(2, 6):
    writer.begin(header(step), tensors(step))
print("begun", flush=True)
time.sleep(600)
"""


def test_a_rank_that_is_killed_takes_its_writer_along(folder):
    """Held in the midst of a write, so that it cannot be done with what is waiting by itself."""
    rank = subprocess.Popen(
        [sys.executable, "-c", RANK, folder.path, Path(__file__).parents[1]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with rank:
        writer = int(rank.stdout.readline())
        os.mkfifo(folder.path / ".step-00000002.pt.new")  # who opens it waits for a reader
        rank.stdin.write("\n")
        rank.stdin.flush()
        assert rank.stdout.readline() == "begun\n"
        assert _is_running(writer)
        rank.kill()
    until(lambda: not _is_running(writer))
    folder.clean_up()
    assert names(folder.path) == {"step-00000001.pt", "step-00000001.json", "last"}


def _is_running(pid):
    """Whether a process is more than an entry that nobody has collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_process_works_in_short_turns_whatever_the_rank_does(folder):
    with batch_scheduling(), open_process(folder) as writer:
        writer.begin(header(1), tensors(1))
        writer.wait()
        assert os.sched_getscheduler(pid_of(writer)) == os.SCHED_OTHER
