"""Process group: choose the device, join, leave, also after an error."""

import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TypedDict

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from ddp_sgd.distributed.environment import Ranks, may_be_rank_0, only_on_rank, read_ranks
from ddp_sgd.distributed.error_propagation import (
    ErrorPropagation,
    LocalErrorPropagation,
    StoreErrorPropagation,
    abort_group,
    propagate_errors,
    watch_errors,
)
from ddp_sgd.distributed.process_exit import call_with_timeout
from ddp_sgd.distributed.rendezvous import (
    StoreKey,
    could_not_join,
    is_agent_store,
    open_store,
    read_rendezvous_info,
)
from ddp_sgd.errors import ConfigError
from ddp_sgd.host import batch_scheduling, scaled, usable_cpus
from ddp_sgd.seeds import seed_for

_FAREWELL_S = scaled(5.0)
"""Longest wait of the store's host for the others to read of a fault."""
_DEVICE_GRACE_S = scaled(60.0)
"""What a collective on a device may take beyond its timeout."""
_GRACE_S = scaled(2.0)
"""What connecting may take beyond its timeout before it counts as hung."""


class Shard(TypedDict):
    """Rank and world size."""

    rank: int
    world_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """This process, its device and its ties to the others.

    Args:
        rank: Number of this process, in [0, world_size).
        world_size: Number of processes.
        local_rank: Number of this process on its machine.
        device: Where this rank computes.
        backend: Library that carries tensors between ranks; None when alone.
        error_propagation: What becomes of errors.
        store: Key-value store of the group; None when alone.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str | None = None
    error_propagation: ErrorPropagation = field(default_factory=LocalErrorPropagation)
    store: Store | None = None

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.world_size == 1

    @property
    def shard(self) -> Shard:
        """Which part of the data is this rank's, as keyword arguments of a sampler."""
        return {"rank": self.rank, "world_size": self.world_size}

    def seed_for(self, purpose: str, seed: int, *place: int) -> int:
        """Mix the seed of a run with a place in it and with this rank; see ``seeds.seed_for``."""
        return seed_for(purpose, seed, *place, self.rank)


@contextmanager
def start_runtime(
    *, backend: str = "auto", device: str = "auto", timeout_s: float = 300.0
) -> Iterator[Runtime]:
    """Join the other ranks, if the environment names any, and leave them, also after an error.

    Args:
        backend: ``auto`` takes the one that fits the device; else ``gloo``, ``nccl`` or ``xccl``.
            With ``gloo``, ranks of a host that has fewer devices share them.
        device: ``auto`` takes an accelerator where there is one; else ``cpu``, ``cuda``, ``xpu`` or
            ``mps``.
        timeout_s: Longest wait for another rank, when joining and in every collective, in seconds.

    Yields:
        Rank, device and store of this process.

    Raises:
        ConfigError: The environment is half-set, or the device or backend does not exist here.
        PeerError: The others did not come, or went.

    Example:
        >>> with start_runtime(device="cpu") as runtime:
        ...     runtime.world_size
        1
    """
    with only_on_rank(this_one=may_be_rank_0(os.environ)):
        ranks = read_ranks(os.environ)
    place = _choose_device(device, ranks, shared=backend == "gloo")
    with only_on_rank(this_one=ranks.rank == 0):
        _check_backend(backend, place)
    with batch_scheduling():
        if ranks.alone:
            yield Runtime(device=place)
            return
        name = dist.get_default_backend_for_device(place) if backend == "auto" else backend
        with _joined(ranks, place, name, timeout_s) as runtime:
            yield runtime


@contextmanager
def _joined(
    ranks: Ranks, device: torch.device, backend: str, timeout_s: float
) -> Iterator[Runtime]:
    """Join the other ranks, and leave them, also after an error."""
    _share_cpus(ranks)
    with only_on_rank(this_one=ranks.rank == 0):
        store = open_store(ranks, timeout_s)
    info = read_rendezvous_info(store)
    notes = PrefixStore(StoreKey.ERRORS.of(), store)
    error_propagation = StoreErrorPropagation(notes, ranks.rank, info, timeout_s)
    runtime = Runtime(
        rank=ranks.rank,
        world_size=ranks.world_size,
        local_rank=ranks.local_rank,
        device=device,
        backend=backend,
        error_propagation=error_propagation,
        store=notes,
    )
    try:
        error_propagation.farewell = partial(_keep_store_open, notes, ranks)
        with (
            watch_errors(error_propagation, notes.clone(), device),
            propagate_errors(error_propagation),
        ):
            _connect(runtime, ranks, store, info.hosts, timeout_s)
            yield runtime
    except Exception as error:
        _forget_locals(error)
        abort_group()
        _leave_group()  # first of all, so that the others stop waiting for this rank
        if not error_propagation.is_store_silent:
            _keep_store_open(notes, ranks)
        raise
    except BaseException:
        _leave_group()
        raise
    _leave_group()


def _choose_device(wanted: str, ranks: Ranks, *, shared: bool = False) -> torch.device:
    """Choose the device of this rank: each has one of its own, unless they may be shared."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    here = accelerator.type if accelerator else "cpu"
    kind = here if wanted == "auto" else wanted
    if kind == "cpu":
        return torch.device("cpu")
    with only_on_rank(
        this_one=ranks.local_rank == 0
    ):  # hosts may differ: one process of each reports
        if kind != here:
            raise ConfigError(
                f"runtime.device is {wanted}, but this host has {here} only; "
                "set runtime.device=auto."
            )
    count = torch.accelerator.device_count()
    # A site that binds one device to each task shows every rank its own as number 0.
    index = 0 if count == 1 and ranks.launcher == "srun" else ranks.local_rank
    if shared:  # gloo sends tensors by way of the host; NCCL takes one rank for each device
        index %= count
    with only_on_rank(this_one=index == count):  # the first that finds no device
        if index >= count:
            raise ConfigError(
                f"LOCAL_RANK is {index}, but this host has {count} {kind} devices; start at most "
                f"{count} ranks per host, set runtime.device=cpu, or let ranks share devices with "
                "runtime.backend=gloo."
            )
    torch.accelerator.set_device_index(index)
    return torch.device(kind, index)


def _share_cpus(ranks: Ranks) -> None:
    """Divide the CPUs among the ranks of this machine, unless the user or the site did."""
    mine = usable_cpus()
    is_shared = mine == os.cpu_count()  # SLURM may have bound each task to CPUs of its own
    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, mine // ranks.local_world_size) if is_shared else mine)


def _check_backend(backend: str, device: torch.device) -> None:
    needs = {"nccl": "cuda", "xccl": "xpu"}.get(backend, device.type)
    if needs != device.type:
        raise ConfigError(
            f"runtime.backend is {backend}, which needs runtime.device={needs}, while the device "
            f"is {device.type}; set runtime.backend=auto."
        )
    if backend != "auto" and not dist.is_backend_available(backend):
        raise ConfigError(
            f"runtime.backend is {backend}, which this build of torch lacks; "
            "set runtime.backend=gloo."
        )


def _connect(
    runtime: Runtime, ranks: Ranks, store: Store, hosts: list[str], timeout_s: float
) -> None:
    # While there is no group yet: the functions of this module keep the one that they find as a
    # default argument, and its threads would then outlive the interpreter. torch itself imports it
    # late, with the first wrapper.
    import torch.distributed.nn

    os.environ.update(
        RANK=str(ranks.rank),
        WORLD_SIZE=str(ranks.world_size),
        MASTER_ADDR=ranks.address,
        MASTER_PORT=str(ranks.port),
    )

    def connect() -> None:
        if runtime.device.type != "cpu":
            torch.accelerator.set_device_index(runtime.device.index)  # each thread has its own
        dist.init_process_group(
            runtime.backend,
            store=PrefixStore(StoreKey.GROUP.of(), store),
            rank=ranks.rank,
            world_size=ranks.world_size,
            timeout=timedelta(seconds=timeout_s + _collective_grace_s(runtime.device)),
            device_id=None if runtime.device.type == "cpu" else runtime.device,
        )
        dist.barrier()  # a rank that fails at once must not leave while others are still connecting

    if runtime.backend == "nccl":
        # Else NCCL's watchdog ends the process by SIGABRT: no line, no code, no result. See
        # ``watch_errors`` for what ends it instead.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    try:
        call_with_timeout(timeout_s + _GRACE_S, connect)
    except (OSError, RuntimeError, ValueError) as error:  # torch's own classes are RuntimeErrors
        remedy = _find_way(hosts, runtime.backend or "")
        raise could_not_join(ranks, timeout_s, error, remedy) from error


def _collective_grace_s(device: torch.device) -> float:
    """What a collective may take beyond the timeout, in seconds.

    On a device the timeout of torch does not raise, so ours come first: the hang watch, which names
    the rank.
    """
    return 0.0 if device.type == "cpu" else _DEVICE_GRACE_S


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _find_way(hosts: list[str], backend: str) -> str:
    """What to do where ranks have met, but cannot connect; empty on one host."""
    if len(set(hosts)) < 2:
        return ""
    name = f"{'GLOO' if backend == 'gloo' else 'NCCL'}_SOCKET_IFNAME"
    wrong = f"{name} is {os.environ[name]}: " if name in os.environ else ""
    return (
        f"{wrong}set {name}, on every host, to the interface that leads to the others; see that no "
        "host takes its own name for 127.0.1.1, and that no firewall closes ports above 1024."
    )


def _forget_locals(error: BaseException | None) -> None:
    """Release the model in an error's frames: while it exists, the group stays connected."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _keep_store_open(store: Store, ranks: Ranks) -> None:
    """Keep the store running until every rank has read the error, where this rank hosts it."""
    with suppress(RuntimeError, TimeoutError):
        call_with_timeout(_FAREWELL_S + 1.0, lambda: _outlast_others(store, ranks))


def _outlast_others(store: Store, ranks: Ranks) -> None:
    left = StoreKey.LEFT.of()
    store.add(left, 1)
    deadline = time.monotonic() + _FAREWELL_S
    hosts_store = ranks.rank == 0 and not is_agent_store(os.environ)
    while hosts_store and store.add(left, 0) < ranks.world_size:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
