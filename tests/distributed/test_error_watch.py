"""A collective that neither returns nor raises, as on a GPU, while another rank has failed."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import commands
import pytest
import torch
from limits import WAIT_S, scaled
from ranks import rank_environment, run_ranks
from torch import nn
from torch.distributed import HashStore

from ddp_sgd.distributed.error_propagation import StoreErrorPropagation, watch_errors
from ddp_sgd.distributed.rendezvous import RendezvousInfo
from ddp_sgd.errors import DataError, RemoteError
from ddp_sgd.host import free_port

HERE = Path(__file__).parent
FAILS_AT = 10


class StuckInTheStep(nn.Linear):
    """One rank reads a bad sample; the others wait, as for a device, for a peer that is gone."""

    def __init__(self):
        super().__init__(64, 10)
        self._passes = 0

    def forward(self, inputs):
        self._passes += self.training
        if self._passes == FAILS_AT:
            if os.environ["RANK"] == "1":
                Path(os.environ["FAILED_AT"]).write_text(repr(time.time()))
                raise DataError("data.train[7] is bad; remove it.")
            threading.Event().wait()
        return super().forward(inputs)


@pytest.fixture
def memory_path(tmp_path):
    """A folder in memory, where there is one: on a disk, syncs may take half a minute each."""
    shared = Path("/dev/shm")
    if not shared.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


def test_survivors_end_with_the_code_of_the_rank_that_failed(memory_path):
    tmp_path, port = memory_path, free_port()
    said = tmp_path / "said"
    options = [
        "--name=x", f"--output_dir={tmp_path}", "--wandb.mode=disabled", "--runtime.device=cpu",
        "--model={class_path: test_error_watch.StuckInTheStep}",
    ]  # fmt: skip
    mark = {
        "PYTHONPATH": f"{HERE}:{HERE.parent}",
        "FAILED_AT": str(tmp_path / "failed_at"),
        "LAUNCH_EXIT_CODE_FILE": str(tmp_path / "code"),
    }
    with said.open("w") as errors:
        ranks = [
            commands.Popen(
                [sys.executable, "-m", "ddp_sgd.train", *options],
                env=os.environ
                | rank_environment(rank, 3, port)
                | mark
                | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / f"error-{rank}.json")},
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
            for rank in range(3)
        ]
    assert [rank.wait(WAIT_S) for rank in ranks] == [65, 65, 65], said.read_text()
    took_s = time.time() - float((tmp_path / "failed_at").read_text())
    assert said.read_text() == "ddp_sgd: error: data.train[7] is bad; remove it.\n"
    result = json.loads((tmp_path / "x" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 65)
    assert result["error"] == "data.train[7] is bad; remove it."
    assert took_s < scaled(10.0)
    assert (tmp_path / "code").read_text() == "65\n"
    for rank in range(3):
        report = json.loads((tmp_path / f"error-{rank}.json").read_text())
        assert report["message"]["message"] == "data.train[7] is bad; remove it."


def fail_while_another_builds(runtime):
    if runtime.rank == 1:
        raise DataError("the folder is empty; fill it.")
    threading.Event().wait()


def test_it_holds_before_the_first_step():
    results = run_ranks(2, fail_while_another_builds, raises=True)
    assert results[1].error == "DataError"
    assert results[0].error == "EOFError"  # it ended without a word


def _error_propagation(store, rank):
    return StoreErrorPropagation(store, rank, RendezvousInfo(["a"] * 2, "a"), 9.0)


@pytest.mark.parametrize("reporter", [0, 1])
def test_only_the_error_of_another_rank_is_found(reporter):
    store = HashStore()
    propagations = [_error_propagation(store, rank) for rank in range(2)]
    assert propagations[0].find_remote(store) is None
    propagations[reporter].resolve(DataError("x"))
    assert propagations[reporter].find_remote(store) is None
    found = propagations[1 - reporter].find_remote(store)
    assert isinstance(found, RemoteError)
    assert (str(found), found.exit_code) == ("x", 65)


def test_a_thread_that_is_not_needed_ends_with_the_block():
    before = threading.active_count()
    with watch_errors(_error_propagation(HashStore(), 0), HashStore(), torch.device("cpu")):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_a_main_thread_that_has_judged_is_left_alone():
    store = HashStore()
    error_propagation = _error_propagation(store, 0)
    with watch_errors(error_propagation, store, torch.device("cpu")):
        _error_propagation(store, 1).resolve(DataError("x"))
        error_propagation.resolve(RuntimeError("Connection closed by peer"))
        (watch,) = (t for t in threading.enumerate() if t.name == "ddp_sgd-errors")
        watch.join(WAIT_S)
        assert not watch.is_alive()
