"""Rendezvous: the key-value store of the ranks, its keys, and a part of it for each start of a run.

The doctor opens the store without waiting for all ranks, and reads with a timeout.
"""

import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from enum import Enum
from secrets import token_hex
from typing import NamedTuple

from torch.distributed import DistStoreError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore, Store

from ddp_sgd.distributed.environment import Ranks
from ddp_sgd.distributed.process_exit import call_with_timeout
from ddp_sgd.errors import Cause, PeerError, UserError
from ddp_sgd.host import scaled, whereabouts
from ddp_sgd.text import first_line

_INTRODUCTION_S = scaled(10.0)
"""Longest wait of a rank for the name of the run whose store it has reached."""
_GRACE_S = scaled(2.0)
"""What a thread may take beyond its timeout before the caller stops waiting for it."""


class StoreKey(Enum):
    """All keys of the store: writer -> reader, and what is written.

    Below ``ask``, ``answer``, ``rank``, ``note`` and others each rank or question has a key of its
    own, see ``of``.
    """

    # In the whole store, which several starts of a run may share.
    RUN = "run"  # rank 0 -> each rank that joins: name of the run
    ASK = "ask"  # /RANK, that rank -> rank 0: a random question
    ANSWER = "answer"  # /QUESTION, rank 0 -> the rank that asked: prefix of the part of this start

    # In the part of a start.
    RANK = "rank"  # /RANK, that rank -> rank 0: host, process, whether the store is on this host
    INFO = "info"  # rank 0 -> all: ``RendezvousInfo``
    GROUP = "group"  # prefix of the keys of torch's process group

    # Below the prefix ``errors`` of that part.
    ERRORS = "errors"
    FIRST_FAULT = "ddp_sgd/first_fault"  # first rank that fails -> all: its exit code and message
    NOTE = "note"  # /RANK, hang watch of that rank -> all: ``Note``
    REPORT = "report"  # hang watch of any rank -> all: ``HangReport``; of the doctor, see below
    LEFT = "left"  # each rank -> rank 0: how many have read the error; of the doctor, see below

    # Below the prefix ``doctor/RESTART`` of the whole store.
    DOCTOR = "doctor"
    FACTS = "facts"  # /RANK, that rank -> rank 0: ``Facts``
    REQUEST = "request"  # rank 0 -> all: number of ranks, who came, name of a file to look for
    CLOCK = "clock"  # /RANK/ROUND, rank 0 -> that rank; and back below /is: unix time in seconds
    SEES = "sees"  # /RANK, that rank -> rank 0: whether the file is there
    WORD = "word"  # rank 0 -> all: host of each rank, to join the group; null: do not
    CODE = "code"  # rank 0 -> all: exit code
    # REPORT/RANK, that rank -> rank 0: what it ran into; LEFT/RANK: it has read the exit code

    def of(self, *below: int | str) -> str:
        """Return the key, or that of a rank, a question or a round below it."""
        return "/".join([self.value, *map(str, below)])


class RendezvousInfo(NamedTuple):
    """Hosts of the ranks and of their store, as found by a rendezvous.

    Args:
        hosts: Name of the host of each rank, in their order.
        store_host: Name of the host that runs the store.
    """

    hosts: list[str]
    store_host: str


def open_store(ranks: Ranks, timeout_s: float) -> Store:
    """Join the key-value store of all ranks, and wait until every one is there.

    Two runs that take one port do not mix: the store bears the name of its run, each start has a
    part of its own, and every rank exists once.

    Args:
        ranks: This process among all, at least two.
        timeout_s: Longest wait for the others, in seconds.

    Returns:
        A part of the store that no other start has touched. Rank 0 hosts it, unless torchrun's
        agent does; it must not leave before the others have what they need.

    Raises:
        PeerError: The others did not come, or another program has the port.
    """
    try:
        return call_with_timeout(timeout_s + _GRACE_S, lambda: _rendezvous(ranks, timeout_s))
    except (OSError, RuntimeError, ValueError) as error:  # torch's own classes are RuntimeErrors
        raise could_not_join(ranks, timeout_s, error) from error


def read_rendezvous_info(store: Store) -> RendezvousInfo:
    """Return who came, from a store that ``open_store`` opened; this does not wait."""
    return RendezvousInfo(*json.loads(store.get(StoreKey.INFO.of())))


def is_agent_store(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's agent hosts the store, and not rank 0."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def could_not_join(ranks: Ranks, timeout_s: float, error: Exception, remedy: str = "") -> UserError:
    """Return the error of a rank that did not find the others, with its cause and a remedy.

    Args:
        ranks: This process among all.
        timeout_s: How long it tried, in seconds.
        error: What it ran into; an error of ours stays what it is.
        remedy: What to do; empty looks for a trap on the way to the store.
    """
    if isinstance(error, UserError):
        return error
    cause = first_line(error).rstrip(".")
    return PeerError(
        f"rank {ranks.rank} of {ranks.world_size} could not join at {ranks.address}:{ranks.port} "
        f"within {timeout_s:g} s: {cause}; {remedy or _remedy(ranks)}"
    )


def _remedy(ranks: Ranks) -> str:
    address, place = ranks.address, whereabouts(ranks.address)
    several_hosts = ranks.local_world_size < ranks.world_size or ranks.local_rank != ranks.rank
    if several_hosts and place == "loopback":
        return (
            f"{address} is another machine on every host: set MASTER_ADDR to the name of rank 0's "
            "host, as the others see it."
        )
    if place == "unknown":
        return (
            "set MASTER_ADDR to a name of rank 0's host that every host knows, or add it to "
            "/etc/hosts."
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return (
            f"check that every rank was started and reaches {address}, by which torchrun on rank "
            "0's host is known; PET_LOCAL_ADDR there sets another address."
        )
    if ranks.rank == 0 and place == "elsewhere":
        return f"{address} is another host: set MASTER_ADDR to {socket.gethostname()}."
    return (
        "check that every rank was started, that MASTER_ADDR names rank 0's host and that the port "
        "is free."
    )


def _rendezvous(ranks: Ranks, timeout_s: float) -> Store:
    deadline = time.monotonic() + timeout_s
    store = open_whole_store(ranks, timeout_s)
    if not is_agent_store(os.environ):
        _introduce(store, ranks, min(timeout_s, _INTRODUCTION_S))
    return _fresh_part(store, ranks, deadline)


def open_whole_store(ranks: Ranks, timeout_s: float) -> Store:
    """Reach the store that all launches and attempts at this address share, or host it.

    Args:
        ranks: This process among all, at least two.
        timeout_s: Longest wait for the store, in seconds.

    Raises:
        PeerError: The port is taken.
        OSError: Nothing listens there.
        RuntimeError: torch cannot connect.
    """
    if ranks.rank == 0 and not is_agent_store(os.environ):
        return _host(ranks, timeout_s)
    _wait_for_port(ranks, timeout_s)
    return _tcp_store(ranks, timeout_s, is_host=False)


def _host(ranks: Ranks, timeout_s: float) -> Store:
    try:
        return _tcp_store(ranks, timeout_s, is_host=True)
    except RuntimeError as error:
        if not Cause.PORT_IN_USE.is_in(error):
            raise
        raise PeerError(
            f"port {ranks.port} on {socket.gethostname()} is held by another program; set "
            "MASTER_PORT to a free one, the same for every rank."
        ) from error


def _wait_for_port(ranks: Ranks, timeout_s: float) -> None:
    """Wait until the port opens: torch's client would fill the log, and hide the cause."""
    deadline = time.monotonic() + timeout_s
    while True:
        patience_s = min(max(deadline - time.monotonic(), 0.1), 5.0)
        try:
            socket.create_connection((ranks.address, ranks.port), timeout=patience_s).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
        else:
            return
        time.sleep(0.1)


def _tcp_store(ranks: Ranks, timeout_s: float, *, is_host: bool) -> Store:
    # Who connects is not counted, since that may be a rank of another run.
    store: Store = TCPStore(
        ranks.address,
        ranks.port,
        world_size=ranks.world_size,
        is_master=is_host,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return store


def _introduce(store: Store, ranks: Ranks, patience_s: float) -> None:
    name = _name_of_run(ranks, os.environ)
    if ranks.rank == 0:
        store.set(StoreKey.RUN.of(), name)
        return
    try:
        store.wait([StoreKey.RUN.of()], timedelta(seconds=patience_s))
        held_by = f"another run, {store.get(StoreKey.RUN.of()).decode()}"
    except DistStoreError:
        held_by = "another program"
    if held_by != f"another run, {name}":
        raise PeerError(
            f"port {ranks.port} on {ranks.address} is held by {held_by}, while rank {ranks.rank} "
            f"belongs to {name}; set MASTER_PORT to a free one, the same for every rank."
        )


def _name_of_run(ranks: Ranks, environ: Mapping[str, str]) -> str:
    """Name a run as far as its launcher does, equally on all ranks."""
    size = f"{ranks.world_size} ranks"
    if ranks.launcher != "srun":
        return size
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    job, step, restart = (environ.get(name, "0") for name in names)
    return f"{size} of SLURM job {job}, step {step}, restart {restart}"


def _fresh_part(store: Store, ranks: Ranks, deadline: float) -> Store:
    """Give the ranks of this start a part of the store that no earlier one has touched.

    torchrun keeps its store over restarts, with the addresses of ranks that have ended, and
    has no number that is equal on all agents and new in every attempt. So rank 0 draws a word, and
    sends it as the reply to every request: replies to ranks that have ended are not read.
    """
    if ranks.rank > 0:
        question = token_hex(8)
        store.set(StoreKey.ASK.of(ranks.rank), question)
        part = PrefixStore(_wait_for_answer(store, question), store)
        _register_rank(part, ranks)
        part.wait([StoreKey.INFO.of()])
        return part
    word = token_hex(8)
    part = PrefixStore(word, store)
    _register_rank(part, ranks)
    missing = list(range(1, ranks.world_size))
    while missing := [rank for rank in missing if not part.check([StoreKey.RANK.of(rank)])]:
        if time.monotonic() > deadline:
            raise DistStoreError(_missing_ranks(missing, ranks))
        for rank in range(1, ranks.world_size):
            if store.check([StoreKey.ASK.of(rank)]):
                question = store.get(StoreKey.ASK.of(rank)).decode()
                store.set(StoreKey.ANSWER.of(question), word)
        time.sleep(0.01)
    seats = [json.loads(part.get(StoreKey.RANK.of(rank))) for rank in range(ranks.world_size)]
    hosts = [host for host, *_ in seats]
    near = [host for host, _, is_near in seats if is_near]
    part.set(StoreKey.INFO.of(), json.dumps([hosts, near[0] if near else ranks.address]))
    return part


def _wait_for_answer(store: Store, question: str) -> str:
    try:
        return store.get(StoreKey.ANSWER.of(question)).decode()
    except DistStoreError as error:
        raise DistStoreError("rank 0 is there, but waits for nobody any more") from error


def _register_rank(part: Store, ranks: Ranks) -> None:
    seat = [socket.gethostname(), os.getpid(), whereabouts(ranks.address) in ("here", "loopback")]
    taken = json.loads(part.compare_set(StoreKey.RANK.of(ranks.rank), "", json.dumps(seat)))
    if taken != seat:
        raise PeerError(
            f"rank {ranks.rank} of {ranks.world_size} is at {ranks.address}:{ranks.port} already, "
            f"as process {taken[1]} on {taken[0]}; start every rank once, and set another "
            "MASTER_PORT for every run."
        )


def _missing_ranks(missing: list[int], ranks: Ranks) -> str:
    shown = ", ".join(map(str, missing[:8])) + (" and more" if len(missing) > 8 else "")
    return f"rank{'s' * (len(missing) > 1)} {shown} of {ranks.world_size} did not come"


def reach_store(ranks: Ranks, timeout_s: float, environ: Mapping[str, str]) -> Store:
    """Reach the store of the ranks without waiting for all of them.

    Unlike ``open_store`` this lets those that did come report on the others.

    Args:
        ranks: This process among all, at least two.
        timeout_s: Longest wait for the store, in seconds.
        environ: The environment, such as ``os.environ``.

    Raises:
        PeerError: Rank 0 cannot be reached, or its port is taken.
    """
    try:
        store = call_with_timeout(timeout_s + 1.0, lambda: open_whole_store(ranks, timeout_s))
    except (OSError, RuntimeError, ValueError) as error:
        raise could_not_join(ranks, timeout_s, error) from error
    # torchrun keeps its store over restarts.
    restart = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(StoreKey.DOCTOR.of(restart), store)


def read_key(store: Store, key: str, patience_s: float) -> bytes | None:
    """Return a value when it is there; None if it does not come in time.

    Args:
        store: From ``reach_store``.
        key: Its name.
        patience_s: Longest wait, in seconds; torch notes in the log when it is over.

    Raises:
        PeerError: The store is gone, and rank 0 with it.
    """
    with needs_store():
        try:
            store.wait([key], timedelta(seconds=patience_s))
        except DistStoreError:
            return None
        return bytes(store.get(key))


def is_there(store: Store, key: str) -> bool:
    """Whether there is a value.

    Raises:
        PeerError: The store is gone, and rank 0 with it.
    """
    with needs_store():
        return bool(store.check([key]))


@contextmanager
def needs_store() -> Iterator[None]:
    """Translate the error of a store that is gone.

    Raises:
        PeerError: In place of what torch raises.
    """
    try:
        yield
    except RuntimeError as error:  # torch's own classes are RuntimeErrors
        raise PeerError(
            f"rank 0 cannot be reached any more: {first_line(error)}; look at its log."
        ) from error
