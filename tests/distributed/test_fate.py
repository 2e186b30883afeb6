"""The first fault of any rank is the one that the user reads, once."""

import os

import pytest
import torch
from ranks import run_ranks
from torch.distributed import HashStore

from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.fate import OwnFate, SharedFate, is_lost_peer, shared_fate
from ddp_sgd.errors import ConfigError, DataError, ExitCode, PeerError


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
        assert result.error == (type(error).__name__ if rank == culprit else "FaultElsewhereError")
        assert str(error) in result.text


def fail_alike(runtime):
    sum_over_ranks(torch.zeros(1), runtime)
    raise ConfigError("model is wrong; mend it.")


def test_a_fault_that_all_find_is_told_by_one():
    errors = sorted(result.error for result in run_ranks(4, fail_alike, raises=True))
    assert errors == ["ConfigError"] + 3 * ["FaultElsewhereError"]


def vanish(runtime, victim):
    sum_over_ranks(torch.zeros(1), runtime)
    if runtime.rank == victim:
        os._exit(9)
    sum_over_ranks(torch.zeros(1), runtime)


def test_a_lost_rank_is_a_peer_error_told_by_one():
    results = run_ranks(3, vanish, 2, raises=True)
    assert sorted(result.error for result in results[:2]) == ["FaultElsewhereError", "PeerError"]
    told = next(result for result in results if result.error == "PeerError")
    assert "of 3 is cut off: " in told.text
    assert "then start again." in told.text


def test_a_lost_host_of_the_store_is_a_peer_error_on_all():
    results = run_ranks(3, vanish, 0, raises=True)
    assert {result.error for result in results[1:]} == {"PeerError"}


def test_alone_errors_stay_what_they_are():
    error = DataError("x")
    assert OwnFate().judge(error) is error
    with pytest.raises(DataError), shared_fate(OwnFate()):
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
    told = str(SharedFate(HashStore(), 0, 2).judge(RuntimeError(chatter)))
    assert told.startswith("rank 0 of 2 is cut off: Connection closed by peer [127.0.0.1]:5; look")
