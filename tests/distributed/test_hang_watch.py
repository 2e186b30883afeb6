"""A rank that hangs is found and named, and ends the job; nothing else does."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time

import coverage
import pytest
import torch
from limits import WAIT_S
from ranks import run_ranks

from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.hang_watch import watch_for_hangs
from ddp_sgd.distributed.progress import HangReport, Phase, ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import PeerError

HANG_S = 2.5
HOST = socket.gethostname()


def watched(runtime, progress, folder, hang_s=HANG_S, stacks="logs", on_orphaned=lambda: None):
    """Keep watch, in a process whose last words and exit code a test can read."""
    sys.stderr = (folder / f"stderr-{runtime.rank}").open("w")

    def leave(code, leave=os._exit):
        (folder / f"exit-{runtime.rank}").write_text(str(code))
        if measured := coverage.Coverage.current():
            measured.stop()
            measured.save()
        leave(code)

    def on_hang(error):
        (folder / f"error-{runtime.rank}").write_text(f"{type(error).__name__}: {error}")

    os._exit = leave
    return watch_for_hangs(
        runtime,
        progress,
        hang_s=hang_s,
        stacks=folder / stacks,
        on_hang=on_hang,
        on_orphaned=on_orphaned,
    )


def all_ended(results, folder):
    """Check that every rank ended alike; return the one line that was told."""
    assert [result.error for result in results] == ["EOFError"] * len(results)
    ranks = range(len(results))
    assert [(folder / f"exit-{rank}").read_text() for rank in ranks] == ["69"] * len(results)
    told = [(folder / f"stderr-{rank}").read_text() for rank in ranks]
    (line,) = [text for text in told if text]
    assert line.startswith("ddp_sgd: error: ")
    assert line.count("\n") == 1
    message = line.removeprefix("ddp_sgd: error: ").strip()
    for rank in ranks:
        assert (folder / f"error-{rank}").read_text() == f"PeerError: {message}"
    return message


def read_a_disk_that_is_gone():
    threading.Event().wait(WAIT_S)


def a_step(runtime, progress, step):
    progress.enter(Phase.DATA, step)
    progress.enter(Phase.ALL_REDUCE)
    sum_over_ranks(torch.zeros(1), runtime)


def block(runtime, folder, culprit):
    progress = ProgressTracker()
    with watched(runtime, progress, folder):
        a_step(runtime, progress, 56)
        progress.enter(Phase.DATA, 57)
        if runtime.rank == culprit:
            read_a_disk_that_is_gone()
        progress.enter(Phase.ALL_REDUCE)
        sum_over_ranks(torch.zeros(1), runtime)


@pytest.mark.parametrize("culprit", [0, 2])
def test_a_rank_that_hangs_in_python_is_named(culprit, tmp_path):
    message = all_ended(run_ranks(3, block, tmp_path, culprit, raises=True), tmp_path)
    assert message == (
        f"rank {culprit} of 3 on host {HOST} is stuck, with no progress for 2.5 s in phase "
        f'"reading data" of step 57; look at stack-rank-{culprit}.txt in {tmp_path / "logs"}, and '
        "raise runtime.hang_s if a phase may take that long."
    )
    stacks = [(tmp_path / "logs" / f"stack-rank-{rank}.txt").read_text() for rank in range(3)]
    assert [rank for rank in range(3) if "read_a_disk_that_is_gone" in stacks[rank]] == [culprit]
    assert all("in block" in text for text in stacks)


def freeze(runtime, folder, culprit):
    progress = ProgressTracker()
    with watched(runtime, progress, folder):
        a_step(runtime, progress, 8)
        progress.enter(Phase.DATA, 9)
        if runtime.rank == culprit:
            os.kill(os.getpid(), signal.SIGSTOP)
        while True:
            a_step(runtime, progress, progress.step + 1)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_frozen_rank_is_named_and_woken_to_end(culprit, tmp_path):
    message = all_ended(run_ranks(2, freeze, tmp_path, culprit, raises=True), tmp_path)
    assert message.startswith(
        f"rank {culprit} of 2 on host {HOST} is frozen, with no sign of life for 2.5 s in phase "
    )
    for rank in range(2):
        assert "in freeze" in (tmp_path / "logs" / f"stack-rank-{rank}.txt").read_text()


def suspend(runtime, folder):
    progress = ProgressTracker()
    with watched(runtime, progress, folder):
        a_step(runtime, progress, 0)
        waker = subprocess.Popen(["sh", "-c", f"sleep {1.5 * HANG_S}; kill -CONT {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
        waker.wait()
        a_step(runtime, progress, 1)
    return progress.step


def test_a_job_that_is_suspended_as_a_whole_goes_on(tmp_path):
    assert run_ranks(2, suspend, tmp_path) == [1, 1]


def crawl(runtime, folder):
    """One rank shows life often enough, within one phase; the others wait too long."""
    progress = ProgressTracker()
    with watched(runtime, progress, folder):
        progress.enter(Phase.EVALUATE)
        if runtime.rank == 1:
            for _ in range(10):
                time.sleep(1.5 * HANG_S / 10)
                progress.touch()
        progress.enter(Phase.SYNC)
        sum_over_ranks(torch.zeros(1), runtime)
    return progress.phase


def test_slow_progress_is_progress_and_those_who_wait_for_it_do_not_hang(tmp_path):
    assert run_ranks(2, crawl, tmp_path) == [Phase.SYNC] * 2


def leave_early(runtime, folder):
    progress = ProgressTracker()
    with watched(runtime, progress, folder):
        if runtime.rank == 0:
            progress.enter(Phase.SAVE)
            read_a_disk_that_is_gone()
    return "left"


def test_who_left_is_not_blamed(tmp_path):
    first, second = run_ranks(2, leave_early, tmp_path, raises=True)
    assert second == "left"
    assert all_ended([first], tmp_path).startswith(f"rank 0 of 2 on host {HOST} is stuck, ")


@pytest.mark.parametrize("stacks", ["logs", "exit-0/logs"])
def test_alone_and_with_a_folder_that_cannot_be_made(stacks, tmp_path):
    (tmp_path / "exit-0").write_text("a file")
    results = run_ranks(1, hang_alone, tmp_path, stacks, raises=True)
    assert all_ended(results, tmp_path).startswith(f"rank 0 of 1 on host {HOST} is stuck, ")
    assert (tmp_path / stacks).exists() == (stacks == "logs")


def hang_alone(runtime, folder, stacks):
    with watched(runtime, ProgressTracker(), folder, stacks=stacks):
        read_a_disk_that_is_gone()


def lose_the_store(runtime, folder):
    """Rank 0 goes, while the other waits for something that is not a collective."""
    with watched(runtime, ProgressTracker(), folder):
        if runtime.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        read_a_disk_that_is_gone()


def test_without_the_store_a_rank_ends_alone(tmp_path):
    results = run_ranks(2, lose_the_store, tmp_path, raises=True)
    assert [result.error for result in results] == ["EOFError"] * 2
    assert (tmp_path / "exit-1").read_text() == "69"
    assert (tmp_path / "stderr-1").read_text() == (
        f"ddp_sgd: error: rank 1 of 2 on host {HOST} is stuck, with no progress for 2.5 s in "
        'phase "start" of step 0, and the store of rank 0 does not answer; look at what became of '
        "that process and its host, then start again.\n"
    )


def fail(runtime, folder):
    progress = ProgressTracker()
    with watched(runtime, progress, folder):
        a_step(runtime, progress, 0)
        raise ValueError("a defect")


def test_an_error_leaves_as_it_came(tmp_path):
    errors = sorted(result.error for result in run_ranks(2, fail, tmp_path, raises=True))
    assert errors == ["RemoteError", "ValueError"]


def lose_peers_upon_a_report(runtime, folder):
    """What a collective meets when a peer read the report first; the next poll is 5 s away."""
    report = HangReport("rank 7 is stuck; look there.", 1, [])
    with watched(runtime, ProgressTracker(), folder, hang_s=300.0):
        runtime.store.compare_set("report", "", json.dumps(report))
        raise RuntimeError("Connection closed by peer")


def test_a_peer_that_left_upon_a_report_is_not_a_second_fault(tmp_path):
    results = run_ranks(2, lose_peers_upon_a_report, tmp_path, raises=True)
    assert all_ended(results, tmp_path) == "rank 7 is stuck; look there."


def leave_while_the_store_is_silent(runtime, folder):
    """Rank 1 leaves while rank 0, which hosts the store, is stopped; then wakes it."""
    process = torch.tensor(os.getpid() if runtime.rank == 0 else 0)
    sum_over_ranks(process, runtime)
    start = time.monotonic()
    with watched(runtime, ProgressTracker(), folder, hang_s=300.0):
        if runtime.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            while "T" not in state_of(int(process)):
                time.sleep(0.01)
            start = time.monotonic()
    left_s = time.monotonic() - start
    if runtime.rank == 1:
        os.kill(int(process), signal.SIGCONT)
    return left_s


def state_of(process):
    with open(f"/proc/{process}/stat") as file:  # noqa: PTH123
        return file.read().rpartition(")")[2].split()[0]


def test_leaving_does_not_wait_for_a_silent_store(tmp_path):
    _, left_s = run_ranks(2, leave_while_the_store_is_silent, tmp_path)
    assert left_s < 4.5  # a poll takes 5 s, the parts of leaving 1.5 s


def lose_the_launcher(runtime, folder, is_torchrun, hang_s):
    """Fork a launcher, which forks a rank; end the launcher, and listen to what the rank says."""
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    if is_torchrun:
        os.environ["TORCHELASTIC_RUN_ID"] = "none"
    heard, say = os.pipe()
    rest, hold = os.pipe()
    if (launcher := os.fork()) == 0:
        if os.fork() == 0:
            os.close(hold)
            with watch_for_hangs(
                runtime,
                ProgressTracker(),
                hang_s=hang_s,
                stacks=None,
                on_hang=lambda _: os.write(say, b"hang "),
                on_orphaned=lambda: os.write(say, b"orphaned "),
            ):
                os.write(say, b"ready ")
                os.read(rest, 1)  # until the test has heard enough
        else:
            os.read(rest, 1)
        os._exit(0)
    os.close(say)
    assert os.read(heard, 10) == b"ready "
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    text = read_to(heard, b"hang" if hang_s else b"orphaned")
    os.close(hold)
    return text


def read_to(pipe, word):
    text = b""
    while word not in text and select.select([pipe], [], [], 60)[0] and (more := os.read(pipe, 10)):
        text += more
    return text


@pytest.mark.parametrize(
    ("is_torchrun", "hang_s", "said"),
    [(True, None, b"orphaned "), (True, 2.0, b"orphaned hang "), (False, 2.0, b"hang ")],
)
def test_a_rank_whose_agent_died_is_told_so(is_torchrun, hang_s, said, tmp_path):
    assert run_ranks(1, lose_the_launcher, tmp_path, is_torchrun, hang_s) == [said]


def test_the_tracker_knows_the_phase():
    progress = ProgressTracker()
    progress.enter(Phase.DATA, 7)
    progress.enter(Phase.ALL_REDUCE)
    progress.touch()
    assert (progress.step, progress.phase, progress.count, progress.ticks) == (
        7,
        Phase.ALL_REDUCE,
        2,
        3,
    )


def test_off_there_is_no_board_and_errors_of_callbacks_do_not_matter(monkeypatch):
    asked = threading.Event()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")

    def on_orphaned():
        asked.set()
        raise PeerError("x")

    with watch_for_hangs(
        Runtime(),
        ProgressTracker(),
        hang_s=None,
        stacks=None,
        on_hang=print,
        on_orphaned=on_orphaned,
    ):
        monkeypatch.setattr(os, "getppid", lambda: 0)
        assert asked.wait(WAIT_S)
        names = [thread.name for thread in threading.enumerate()]
    assert "ddp_sgd-watch" in names
    assert "ddp_sgd-board" not in names
    assert "ddp_sgd-watch" not in [thread.name for thread in threading.enumerate()]
