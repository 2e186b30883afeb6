"""Ranks on GPUs, whose collectives do not raise when a peer fails; needs CUDA and NCCL."""

import os
import time

import pytest
import torch
from limits import scaled
from ranks import RankError, run_ranks

from ddp_sgd.distributed.collectives import sum_over_ranks
from ddp_sgd.distributed.error_propagation import _communicator_error, abort_group
from ddp_sgd.errors import DataError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def ask_the_communicator(runtime):
    sum_over_ranks(torch.ones(1, device=runtime.device), runtime)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    before = _communicator_error(runtime.device)
    abort_group()
    return before, torch.distributed.is_initialized()


def fail_on_rank_1(runtime, mark):
    sum_over_ranks(torch.ones(1, device=runtime.device), runtime)
    if runtime.rank == 1:
        mark.write_text(repr(time.time()))
        raise DataError("data.train[7] is bad; remove it.")
    sum_over_ranks(torch.ones(1, device=runtime.device), runtime).tolist()


two_gpus = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="NCCL wants a GPU a rank"
)


@two_gpus
def test_a_sound_communicator_reports_nothing_and_can_be_aborted():
    assert run_ranks(2, ask_the_communicator, device="cuda") == [(None, False)] * 2


@two_gpus
def test_a_survivor_that_waits_for_the_device_ends(tmp_path):
    mark = tmp_path / "failed"
    results = run_ranks(2, fail_on_rank_1, mark, device="cuda", raises=True)
    assert time.time() - float(mark.read_text()) < scaled(10.0)
    assert all(isinstance(result, RankError) for result in results)
    assert results[1].error == "DataError"
    assert results[0].error in ("EOFError", "RemoteError")  # ended, or found out
