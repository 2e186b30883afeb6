"""The first fault of any rank is the one that the user reads, once."""

import json
import os
import signal
import subprocess
import sys
import time

import commands
import pytest
import torch
from launching import environment
from limits import WAIT_S
from ranks import rank_environment, run_ranks
from torch.distributed import HashStore, TCPStore

from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.error_propagation import (
    LocalErrorPropagation,
    StoreErrorPropagation,
    is_lost_peer,
    propagate_errors,
)
from ddp_sgd.distributed.progress import Note
from ddp_sgd.distributed.rendezvous import RendezvousInfo
from ddp_sgd.errors import ConfigError, DataError, ExitCode, PeerError, RemoteError
from ddp_sgd.host import free_port


def fail(runtime, culprit, error):
    sum_over_ranks(torch.zeros(1), runtime)
    if runtime.rank == culprit:
        raise error
    sum_over_ranks(torch.zeros(1), runtime)  # waits for a rank that will not come


@pytest.mark.parametrize("culprit", [0, 1, 2])
@pytest.mark.parametrize(
    "error", [DataError("label is 12; number from 0."), ValueError("a defect")]
)
def test_the_others_end_with_the_same_fault_in_silence(culprit, error):
    results = run_ranks(3, fail, culprit, error, raises=True)
    for rank, result in enumerate(results):
        assert result.error == (type(error).__name__ if rank == culprit else "RemoteError")
        assert str(error) in result.text


def fail_alike(runtime):
    sum_over_ranks(torch.zeros(1), runtime)
    raise ConfigError("model is wrong; fix it.")


def test_a_fault_that_all_find_is_reported_by_one():
    errors = sorted(result.error for result in run_ranks(4, fail_alike, raises=True))
    assert errors == ["ConfigError"] + 3 * ["RemoteError"]


def vanish(runtime, victim):
    sum_over_ranks(torch.zeros(1), runtime)
    if runtime.rank == victim:
        os._exit(9)
    sum_over_ranks(torch.zeros(1), runtime)


def test_a_lost_rank_is_a_peer_error_reported_by_one():
    results = run_ranks(3, vanish, 2, raises=True)
    assert sorted(result.error for result in results[:2]) == ["PeerError", "RemoteError"]
    told = next(result for result in results if result.error == "PeerError")
    assert "of 3 is cut off: " in told.text
    assert "then start again." in told.text


def test_a_lost_host_of_the_store_is_a_peer_error_reported_by_one():
    results = run_ranks(4, vanish, 0, raises=True)
    assert [result.error for result in results[1:]] == ["PeerError", *2 * ["RemoteError"]]
    assert "rank 0 of 4 on host " in results[1].text
    assert "is gone, and with it the store of the ranks: " in results[1].text


def start_by_hand(folder, world_size):
    options = [
        "--name=x", f"--output_dir={folder}", "--epochs=100000", "--eval.every_epochs=100000",
        "--log.every_steps=1", "--runtime.device=cpu",
    ]  # fmt: skip
    port = free_port()
    return [
        commands.Popen(
            [sys.executable, "-m", "ddp_sgd.train", *options],
            env=environment(**rank_environment(rank, world_size, port)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]


def test_rank_0_that_is_killed_without_a_launcher_is_told_of_once(tmp_path):
    ranks = start_by_hand(tmp_path, 3)
    journal = tmp_path / "x" / "metrics.jsonl"
    deadline = time.monotonic() + WAIT_S
    while not (journal.exists() and '"event": "train"' in journal.read_text()):
        assert all(rank.poll() is None for rank in ranks)
        assert time.monotonic() < deadline
        time.sleep(0.05)
    ranks[0].kill()
    said = [rank.communicate(timeout=WAIT_S)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks[1:]] == [ExitCode.PEER, ExitCode.PEER]
    (line,) = "".join(said).splitlines()
    assert line.startswith("ddp_sgd: error: rank 0 of 3 on host ")
    assert "is gone, and with it the store of the ranks" in line


def test_alone_errors_stay_what_they_are():
    error = DataError("x")
    assert LocalErrorPropagation().resolve(error) is error
    with pytest.raises(DataError), propagate_errors(LocalErrorPropagation()):
        raise error


def test_what_counts_as_a_lost_peer():
    assert is_lost_peer(
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer")
    )
    assert is_lost_peer(torch.distributed.DistNetworkError("down"))
    assert not is_lost_peer(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_lost_peer(ValueError("Connection reset"))
    assert not is_lost_peer(PeerError("Connection reset"))
    assert PeerError("x").exit_code == ExitCode.PEER


def test_a_lost_peer_is_told_of_without_the_chatter_of_gloo():
    chatter = (
        "[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5. This "
        "is typically caused by a crash. GLHF! 🏖️"
    )
    told = str(
        StoreErrorPropagation(HashStore(), 0, RendezvousInfo(["a", "b"], "a"), 9.0).resolve(
            RuntimeError(chatter)
        )
    )
    assert told.startswith("rank 0 of 2 is cut off: Connection closed by peer [127.0.0.1]:5; look")


@pytest.fixture
def store_and_host():
    """Client of a store, and the process that hosts it."""
    code = (
        "from torch.distributed import TCPStore;"
        "store = TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False);"
        "print(store.port, flush=True); input()"
    )
    host = commands.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    store = TCPStore("127.0.0.1", int(host.stdout.readline()), wait_for_workers=False)
    yield store, host
    host.send_signal(signal.SIGCONT)
    host.communicate("", timeout=WAIT_S)


@pytest.fixture
def frozen_store(store_and_host):
    """Client of a store whose host stands still."""
    store, host = store_and_host
    host.send_signal(signal.SIGSTOP)
    return store


@pytest.fixture
def lost_store(store_and_host):
    """Client of a store whose host was killed."""
    store, host = store_and_host
    host.kill()
    host.wait(WAIT_S)
    return store


HOSTS = ["node1", "node1", "node2", "node2"]
SILENCE = RuntimeError("[gloo/transport/tcp/x.cc:1] Timed out waiting 9000ms for recv operation")


@pytest.mark.parametrize(
    ("rank", "error", "words"),
    [
        (2, PeerError, "node1 (ranks 0, 1) has not been heard of for 9 s; see that the host"),
        (3, RemoteError, "node1 (ranks 0, 1) has not been heard of for 9 s; see that"),
        (1, PeerError, "rank 1 of 4 is cut off: Timed out waiting 9000ms for recv operation; look"),
    ],
)
def test_host_of_a_silent_store_is_named_by_one_rank_of_a_host(
    frozen_store, monkeypatch, rank, error, words
):
    monkeypatch.setattr("ddp_sgd.distributed.error_propagation._PATIENCE_S", 0.3)
    error_propagation = StoreErrorPropagation(
        frozen_store, rank, RendezvousInfo(HOSTS, "node1"), 9.0
    )
    judged = error_propagation.resolve(SILENCE)
    assert type(judged) is error
    assert words in str(judged)
    assert error_propagation.resolve(judged) is judged


NOT_JOINED = PeerError("rank 1 of 4 could not join; start again.")


@pytest.mark.parametrize("agent", ["False", "True"])
@pytest.mark.parametrize("error", [SILENCE, NOT_JOINED])
def test_lost_store_is_told_of_by_one_rank_of_a_host(agent, error, lost_store, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", agent)
    tellers = [
        rank
        for rank in range(4)
        if isinstance(
            StoreErrorPropagation(lost_store, rank, RendezvousInfo(HOSTS, "node1"), 9.0).resolve(
                error
            ),
            PeerError,
        )
    ]
    # Where torchrun hosts the store, rank 0 does not, and is as cut off as the others.
    assert tellers == ([0, 2] if agent == "True" else [0, 1, 2])


def test_fault_of_ones_own_is_told_though_the_store_is_silent(frozen_store, monkeypatch):
    monkeypatch.setattr("ddp_sgd.distributed.error_propagation._PATIENCE_S", 0.3)
    error = DataError("x")
    error_propagation = StoreErrorPropagation(frozen_store, 2, RendezvousInfo(HOSTS, "node1"), 9.0)
    assert error_propagation.resolve(error) is error


def test_hosts_that_make_no_notes_are_named(monkeypatch):
    monkeypatch.setattr("ddp_sgd.distributed.error_propagation.NOTE_S", 0.1)
    store = HashStore()
    for rank in range(4):
        note = Note(step=1, phase="x", phases=1, idle_s=0.0, polls=7, left=rank < 2)
        store.set(f"note/{rank}", json.dumps(note))
    judged = StoreErrorPropagation(store, 1, RendezvousInfo(HOSTS, "node1"), 9.0).resolve(SILENCE)
    assert isinstance(judged, PeerError)
    assert str(judged).startswith("node2 (ranks 2, 3) has not been heard of for 9 s; see that")
    later = StoreErrorPropagation(store, 0, RendezvousInfo(HOSTS, "node1"), 9.0).resolve(
        ValueError("x")
    )
    assert isinstance(later, RemoteError)
    assert str(later) == str(judged)
