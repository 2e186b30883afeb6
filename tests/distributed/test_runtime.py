import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import rank_environment, run_ranks

from ddp_sgd.config import RunConfig
from ddp_sgd.distributed.environment import Ranks, read_ranks
from ddp_sgd.distributed.runtime import (
    Runtime,
    _choose_device,
    _share_cpus,
    start_runtime,
)
from ddp_sgd.engine.fit import fit
from ddp_sgd.errors import ConfigError, PeerError, RemoteError
from ddp_sgd.host import free_port, usable_cpus


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in rank_environment(0, 1, 1):
            monkeypatch.delenv(name)


def test_alone_there_is_no_group():
    with start_runtime(device="cpu") as runtime:
        assert runtime == Runtime(error_propagation=runtime.error_propagation)
        assert runtime.alone
        assert runtime.store is None
        assert not dist.is_initialized()


def look(runtime):
    return (
        runtime.rank,
        runtime.world_size,
        runtime.local_rank,
        runtime.backend,
        str(runtime.device),
        dist.is_initialized(),
    )


def test_ranks_find_each_other():
    assert run_ranks(2, look) == [(r, 2, r, "gloo", "cpu", True) for r in range(2)]


def use_store(runtime):
    return runtime.store.add("number", 1)


def test_ranks_share_a_store():
    assert sorted(run_ranks(2, use_store)) == [1, 2]


def join_and_leave(_, rank, port, fault):
    os.environ.update(rank_environment(rank, 1, port) | {"WORLD_SIZE": "1"})
    try:
        with start_runtime(device="cpu"):
            if fault:
                raise ValueError("x")
    except ValueError:
        pass
    return dist.is_initialized()


@pytest.mark.parametrize("fault", [False, True])
def test_one_rank_under_torchrun_is_alone(fault):
    assert run_ranks(1, join_and_leave, 0, free_port(), fault) == [False]


def group_is_left(_, fault):
    try:
        with start_runtime(device="cpu", timeout_s=20):
            if fault:
                raise fault
    except BaseException:
        pass
    return dist.is_initialized()


def srun_ranks(_, environment, fault):
    os.environ.update(environment)
    return group_is_left(None, fault)


@pytest.mark.parametrize("fault", [None, ValueError("x"), KeyboardInterrupt()])
def test_the_group_is_always_left(fault, monkeypatch):
    port = free_port()
    results = {}

    def start(rank):
        environment = rank_environment(rank, 2, port)
        results[rank] = run_ranks(1, srun_ranks, environment, fault)[0]

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {0: False, 1: False}


def test_joining_is_bounded(monkeypatch):
    for name, value in rank_environment(0, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(
            PeerError,
            match=r"rank 0 of 2 could not join at 127.0.0.1:\d+ within 1 s: .*; check that",
        ),
        start_runtime(device="cpu", timeout_s=1.0),
    ):
        raise AssertionError("nobody else is there")
    assert not dist.is_initialized()


def wait_for_the_other(runtime):
    if runtime.rank == 1:
        runtime.error_propagation._store.wait(
            ["ddp_sgd/first_fault"], timedelta(seconds=60)
        )  # alive, but absent
        return
    dist.all_reduce(torch.zeros(1))


def test_collectives_are_bounded():
    first, _ = run_ranks(2, wait_for_the_other, timeout_s=2.0, raises=True)
    assert first.error == "PeerError"


def test_a_device_that_is_not_there(monkeypatch):
    here = torch.accelerator.current_accelerator(check_available=True)
    missing = "xpu" if here is None or here.type != "xpu" else "cuda"
    with (
        pytest.raises(
            ConfigError, match=f"runtime.device is {missing}, but this host has .* only; set"
        ),
        start_runtime(device=missing),
    ):
        pass
    for name, value in rank_environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RemoteError):  # rank 0 tells
        with start_runtime(device=missing):
            pass


def test_a_backend_that_does_not_fit():
    with pytest.raises(
        ConfigError, match="backend is nccl, which needs runtime.device=cuda, while"
    ):
        with start_runtime(device="cpu", backend="nccl"):
            pass
    with pytest.raises(ConfigError, match="backend is mpi, which this build of torch lacks; set"):
        with start_runtime(device="cpu", backend="mpi"):
            pass


def count_threads(_, environment):
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(environment)
    torch.set_num_threads(7)
    _share_cpus(read_ranks(os.environ))
    return torch.get_num_threads()


def test_threads_are_shared_fairly_unless_the_user_chose():
    environment = rank_environment(0, 2, 1)
    del environment["OMP_NUM_THREADS"]
    assert run_ranks(1, count_threads, environment) == [max(1, usable_cpus() // 2)]
    assert run_ranks(1, count_threads, environment | {"OMP_NUM_THREADS": "3"}) == [7]


class Pretended:
    """Two devices of a kind that this machine need not have."""

    def __init__(self, monkeypatch):
        self.chosen = []
        monkeypatch.setattr(torch.accelerator, "current_accelerator", self.current)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: self.count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", self.chosen.append)
        self.count = 2

    def current(self, **_):
        return torch.device("cuda")


def ranks_of(local_rank, launcher="torchrun"):
    return Ranks(
        rank=local_rank, world_size=4, local_rank=local_rank, local_world_size=4, launcher=launcher
    )


def test_each_rank_takes_its_device_and_the_first_without_one_tells(monkeypatch):
    host = Pretended(monkeypatch)
    devices = [_choose_device("auto", ranks_of(rank)) for rank in range(2)]
    assert devices == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert host.chosen == [0, 1]
    with pytest.raises(ConfigError, match="LOCAL_RANK is 2, but this host has 2 cuda devices"):
        _choose_device("auto", ranks_of(2))
    with pytest.raises(RemoteError):
        _choose_device("auto", ranks_of(3))
    sharing = [_choose_device("auto", ranks_of(rank), shared=True) for rank in range(4)]
    assert [device.index for device in sharing] == [0, 1, 0, 1]
    host.count = 1  # a site that binds one device to each task
    assert _choose_device("cuda", ranks_of(3, "srun")) == torch.device("cuda", 0)


def threads_after_a_run(_, environment, folder):
    os.environ.update(environment)
    config = RunConfig(output_dir=folder, epochs=1, wandb={"mode": "disabled"})
    with start_runtime(device="cpu", timeout_s=20) as runtime:
        fit(config, runtime)
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


def test_no_thread_of_the_group_outlives_it(tmp_path):
    """One that drops its last tensor while the interpreter ends would abort the process."""
    port = free_port()
    left = {}

    def start(rank):
        environment = rank_environment(rank, 2, port)
        left[rank] = run_ranks(1, threads_after_a_run, environment, str(tmp_path))[0]

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(left) == 2
    assert not [name for names in left.values() for name in names if "gloo" in name]
