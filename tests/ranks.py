"""Real ranks for tests: processes forked from one server that has imported torch, joined by gloo
on loopback.
"""

import functools
import multiprocessing
import os
import traceback
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import coverage
import pytest
from limits import WAIT_S, scaled

from ddp_sgd.host import free_port

_CONTEXT = multiprocessing.get_context("forkserver")
_MEASURING = {name: value for name, value in os.environ.items() if name.startswith("COV")}


@functools.cache
def _start_server():
    """Start the server with ``rank_imports``, which it finds by the environment only.

    It measures coverage even if the first ranks are those of a file that does not.
    """
    here = Path(__file__).parent
    _CONTEXT.set_forkserver_preload(["rank_imports"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{here.parent}:{here}")
        for name, value in _MEASURING.items():
            patch.setenv(name, value)
        forkserver.ensure_running()


class RankError(Exception):
    """What a rank raised: the name of its class, the message, and the traceback."""

    def __init__(self, rank, error, text):
        super().__init__(rank, error, text)
        self.rank, self.error, self.text = rank, error, text

    def __str__(self):
        return f"rank {self.rank}: {self.text}"


def rank_environment(rank, world_size, port):
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def srun_environment(rank, world_size, port):
    """Describe a rank to which srun has bound a device of its own: the first that it sees."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(world_size),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NODELIST": "localhost",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def run_ranks(
    world_size,
    work,
    *args,
    timeout_s=60.0,
    raises=False,
    deadline_s=WAIT_S,
    device="cpu",
    backend="auto",
    environment_of=rank_environment,
):
    """Call ``work(runtime, *args)`` on every rank; return the values in order, or what each one
    raised.
    """
    _start_server()
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        receive, send = _CONTEXT.Pipe(duplex=False)
        # The server keeps the environment of its start, so each rank is given that of the test.
        environment = dict(os.environ)
        if world_size > 1:
            environment |= environment_of(rank, world_size, port)
        options = {"device": device, "backend": backend, "timeout_s": timeout_s}
        process = _CONTEXT.Process(
            target=_rank, args=(send, environment, rank, options, work, args)
        )
        process.start()
        send.close()
        pipes.append(receive)
        processes.append(process)
    results = []
    try:
        for rank, receive in enumerate(pipes):
            if not receive.poll(deadline_s):
                raise TimeoutError(f"rank {rank} of {world_size} said nothing for {deadline_s} s")
            try:
                results.append(receive.recv())
            except EOFError:
                results.append(RankError(rank, "EOFError", "ended without a word"))
    finally:
        for process in processes:
            process.join(scaled(20))  # it may have to save its coverage
            if process.is_alive():
                process.kill()
                process.join()
            process.close()
    failed = [result for result in results if isinstance(result, RankError)]
    if failed and not raises:
        raise failed[0]
    return results


def _rank(
    send: Any,
    environment: dict[str, str],
    rank: int,
    options: dict[str, Any],
    work: Any,
    args: Any,
):
    os.environ.clear()
    os.environ.update(environment)
    # Else a rank has loader processes started by a fork server of its own, which imports torch.
    multiprocessing.set_start_method(None, force=True)
    measured = coverage.Coverage.current()
    if measured and "UNMEASURED" in environment:
        measured.stop()
        measured = None
    import torch

    from ddp_sgd.distributed.runtime import start_runtime

    torch.set_num_threads(1)
    try:
        with start_runtime(**options) as runtime:
            value = work(runtime, *args)
    except Exception as error:
        value = RankError(rank, type(error).__name__, "".join(traceback.format_exception(error)))
    send.send(value)
    send.close()
    if measured:  # a forked process ends without its exit hooks
        measured.stop()
        measured.save()
