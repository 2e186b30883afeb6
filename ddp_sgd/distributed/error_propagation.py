"""Error propagation: the first error of any rank ends all of them and is reported once.

Lost ranks are those of hosts that no longer renew their liveness notes in the store. Where
collectives do not raise, a thread polls the first reported error: one of gloo raises as soon as a
peer leaves; on a GPU the host waits for the device, in ``tolist`` or in a copy, and the device
waits for a peer that will not come.
"""

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import NoReturn, Protocol

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ErrorType
from torch.distributed import DistError, DistNetworkError
from torch.distributed.distributed_c10d import Store

from ddp_sgd.console import report_error
from ddp_sgd.distributed.process_exit import call_with_timeout, leave_for_launcher, run_with_timeout
from ddp_sgd.distributed.progress import NOTE_S, Note
from ddp_sgd.distributed.rendezvous import RendezvousInfo, StoreKey, is_agent_store
from ddp_sgd.errors import Cause, ExitCode, PeerError, RemoteError, StopInterrupt, UserError
from ddp_sgd.host import scaled
from ddp_sgd.text import first_line

_POLL_S = 0.1


def find_lost_ranks(store: Store, world_size: int, wait_s: float) -> list[int]:
    """Find the ranks whose watch makes no note any more.

    Args:
        store: Where each rank leaves its notes.
        world_size: Number of ranks.
        wait_s: How long to look, in seconds; longer than the time between two notes.

    Returns:
        Ranks in order; none where not all keep a watch.
    """
    keys = [StoreKey.NOTE.of(rank) for rank in range(world_size)]
    if not store.check(keys):
        return []
    first = _read(store, keys)
    lost = list(range(world_size))
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline:
        now = _read(store, [keys[rank] for rank in lost])
        lost = [
            rank
            for rank, note in zip(lost, now, strict=True)
            if not note.left and note.polls == first[rank].polls
        ]
        if not lost:
            break
        time.sleep(_POLL_S)
    return lost


def describe_lost_ranks(ranks: Sequence[int], hosts: Sequence[str], silent_s: float) -> str:
    """Describe which hosts are gone, and what to do, on one line.

    Args:
        ranks: Those that are gone, at least one.
        hosts: Name of the host of every rank.
        silent_s: Since when, in seconds.
    """
    here: dict[str, list[int]] = {}
    for rank in ranks:
        here.setdefault(hosts[rank], []).append(rank)
    shown = [f"{host} ({_name(found)})" for host, found in list(here.items())[:4]]
    more = f" and {len(here) - 4} more" if len(here) > 4 else ""
    return (
        f"{', '.join(shown)}{more} {'have' if len(here) > 1 else 'has'} not been heard of for "
        f"{silent_s:.0f} s; see that the host and the network to it are up, then start again."
    )


def _name(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' * (len(ranks) > 1)} {shown}{' and more' if len(ranks) > 8 else ''}"


def _read(store: Store, keys: list[str]) -> list[Note]:
    return [Note(*json.loads(note)) for note in store.multi_get(keys)]


_PATIENCE_S = scaled(5.0)
"""Longest wait for a store, before its host counts as gone."""
_FIRST_FAULT = StoreKey.FIRST_FAULT.of()


class ErrorPropagation(Protocol):
    """What becomes of an error, given those of the other ranks.

    Attributes:
        before_exit: Called with the error, in a thread, before a process is ended whose main thread
            does not come back: the place to write a result. None calls nothing.
        farewell: Called after that, so that other ranks can read of the error.
    """

    before_exit: Callable[[Exception], None] | None
    farewell: Callable[[], None] | None

    def resolve(self, error: Exception) -> Exception:
        """Return the error that this rank should end with."""


class LocalErrorPropagation:
    """Errors of a single process, which are its own; nothing else ends it."""

    def __init__(self) -> None:
        self.before_exit: Callable[[Exception], None] | None = None
        self.farewell: Callable[[], None] | None = None

    def resolve(self, error: Exception) -> Exception:
        """Return the error unchanged."""
        return error


class StoreErrorPropagation:
    """Errors of ranks in a group: the first one is kept in their store.

    A rank that fails leaves the group, so that collectives of the others fail within moments; they
    find the first error in the store and end with its code, without a line.

    If a host is gone, and takes the store along or not, each side names the other. Without a store
    ranks cannot agree on who reports, so one of each host does: the lowest that can be there.

    Args:
        store: Key-value store of the group.
        rank: Number of this process.
        info: Who is where.
        timeout_s: Longest wait of a collective, in seconds.

    Attributes:
        is_store_silent: Whether the host of the store has been found gone.
        has_resolved: Set as soon as this rank has found an error, of its own or of another rank.
        before_exit: See ``ErrorPropagation``.
        farewell: Called before this process ends: lets the others read what the store holds.
    """

    def __init__(self, store: Store, rank: int, info: RendezvousInfo, timeout_s: float) -> None:
        self._store = store
        self._rank = rank
        self._hosts, self._store_host = info
        self._timeout_s = timeout_s
        self.is_store_silent = False
        self.has_resolved = threading.Event()
        self.before_exit: Callable[[Exception], None] | None = None
        self.farewell: Callable[[], None] | None = None

    def find_remote(self, store: Store) -> RemoteError | None:
        """Return the first error of the run, if another rank reported it.

        Args:
            store: Client of the same store, for the calling thread alone.

        Raises:
            RuntimeError: The store is gone.
        """
        if not store.check([_FIRST_FAULT]):
            return None
        first = json.loads(store.get(_FIRST_FAULT))
        if first["rank"] == self._rank:
            return None
        return RemoteError(first["message"], first["code"])

    def resolve(self, error: Exception) -> Exception:
        """Return the error that this rank should end with.

        Returns:
            The error itself if this rank failed first, as a ``PeerError`` if it is a lost
            connection; ``RemoteError`` if another rank failed before.
        """
        self.has_resolved.set()
        if isinstance(error, RemoteError) or self.is_store_silent:
            return error
        wait_s = 3 * NOTE_S if is_lost_peer(error) and Cause.SILENT_PEER.is_in(error) else 0.0
        try:
            call_with_timeout(_PATIENCE_S, lambda: self._store.check([_FIRST_FAULT]))
            return call_with_timeout(wait_s + _PATIENCE_S, lambda: self._resolve(error, wait_s))
        except TimeoutError:
            self.is_store_silent = True
            return self._resolve_in_silence(error)
        except (DistError, RuntimeError):  # the store went down with its host
            return self._report_once(self._lost_store(error) if is_lost_peer(error) else error)

    def _resolve(self, error: Exception, wait_s: float) -> Exception:
        """Look for lost ranks, if that may be the cause, and for the first error."""
        world_size = len(self._hosts)
        lost = find_lost_ranks(self._store, world_size, wait_s) if wait_s else []
        mine = error
        if lost:
            silent_s = self._timeout_s + wait_s
            mine = PeerError(describe_lost_ranks(lost, self._hosts, silent_s))
        elif is_lost_peer(error):
            mine = self._lost_peer(error)
        code = mine.exit_code if isinstance(mine, UserError) else ExitCode.INTERNAL
        note = json.dumps({"rank": self._rank, "code": int(code), "message": str(mine)})
        first = json.loads(self._store.compare_set(_FIRST_FAULT, "", note))
        if first["rank"] == self._rank:
            return mine
        return RemoteError(first["message"], first["code"])

    def _resolve_in_silence(self, error: Exception) -> Exception:
        """Report the host of the store as lost, from one rank of each other host."""
        if not is_lost_peer(error):
            return self._report_once(error)
        here = self._hosts[self._rank]
        gone = [rank for rank, host in enumerate(self._hosts) if host == self._store_host]
        if not gone or here == self._store_host:
            return self._report_once(self._lost_peer(error))
        message = describe_lost_ranks(gone, self._hosts, self._timeout_s + _PATIENCE_S)
        return self._report_once(PeerError(message))

    def _report_once(self, error: Exception) -> Exception:
        """Report a lost peer, which all ranks miss, from one rank of a host, without communication.

        A rank that hosts the store is not among them: it is what the others miss. Any other error
        is reported by the rank that has it.
        """
        if not isinstance(error, PeerError):
            return error
        store_rank = None if is_agent_store(os.environ) else 0
        here = self._hosts[self._rank]
        near = (rank for rank, host in enumerate(self._hosts) if host == here)
        if self._rank in (
            store_rank,
            min((rank for rank in near if rank != store_rank), default=0),
        ):
            return error
        return RemoteError(str(error), error.exit_code)

    def _lost_store(self, error: Exception) -> PeerError:
        """Return the error of a store that is gone, and with it the rank that hosts it."""
        if is_agent_store(os.environ):
            return self._lost_peer(error)
        return PeerError(
            f"rank 0 of {len(self._hosts)} on host {self._hosts[0]} is gone, and with it the store "
            f"of the ranks: {_cause_of(error)}; look at what became of that process, then start "
            "again."
        )

    def _lost_peer(self, error: Exception) -> PeerError:
        return PeerError(
            f"rank {self._rank} of {len(self._hosts)} is cut off: {_cause_of(error)}; look for the "
            "first error in the logs of the other ranks, then start again."
        )


def _cause_of(error: Exception) -> str:
    """Return the cause in an error of gloo, without the location and the hints that follow."""
    cause = re.sub(r"^\[[^\]]*\]\s*", "", first_line(error))
    return re.split(r"\.\s+(?=[A-Z])", cause)[0].rstrip(".")


def is_lost_peer(error: Exception) -> bool:
    """Whether an error reports that another rank, or the way to it, is gone."""
    if isinstance(error, UserError):
        return False
    return isinstance(error, DistNetworkError) or (
        isinstance(error, RuntimeError) and Cause.LOST_PEER.is_in(error)
    )


@contextmanager
def propagate_errors(error_propagation: ErrorPropagation) -> Iterator[None]:
    """Let every error that leaves the block be judged in the light of those of the other ranks."""
    try:
        yield
    except StopInterrupt as interrupt:
        raise error_propagation.resolve(interrupt.as_error()) from None
    except Exception as error:
        judged = error_propagation.resolve(error)
        if judged is error:
            raise
        raise judged from error


_CHECK_S = 1.0
"""Time between two looks at the store, in seconds."""
_GRACE_S = scaled(3.0)
"""Time for the training thread to raise an error of its own, once another rank reported one."""
_WRITE_S = scaled(5.0)
"""Longest wait for the line, and for the launcher's files: what hangs may be the terminal."""
_RESULT_S = scaled(60.0)
"""Longest wait for what has to be written before the process ends."""
_ABORT_S = scaled(2.0)
"""Longest wait for the communicator to be aborted."""
_LEAVE_S = 0.5
"""Longest wait for this thread, where the host of the store does not respond."""


@contextmanager
def watch_errors(
    error_propagation: StoreErrorPropagation, store: Store, device: torch.device
) -> Iterator[None]:
    """End this process soon after another rank failed, even if its main thread waits for ever.

    The main thread has a few seconds to find the error by itself, which it does wherever a
    collective raises. Else ``end_process`` ends the process with the code of the rank that failed
    first, without a word: that rank has reported it. An error of the communicator itself, such as
    that of NCCL, counts too.

    Args:
        error_propagation: Knows the first error, and whether this rank has found one.
        store: Client of the store for this thread alone.
        device: Where the group computes.
    """
    over = threading.Event()

    def run() -> None:
        is_store_there = True
        while not over.wait(_CHECK_S):
            error: Exception | None = None
            if is_store_there:
                try:
                    error = error_propagation.find_remote(store)
                except Exception:  # the store is gone with its host, which others report
                    is_store_there = False
            error = error or _communicator_error(device)
            if error:
                if not (error_propagation.has_resolved.wait(_GRACE_S) or over.is_set()):
                    end_process(error, error_propagation)
                return

    thread = threading.Thread(target=run, name="ddp_sgd-errors", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_LEAVE_S)


def end_process(error: Exception, error_propagation: ErrorPropagation) -> NoReturn:
    """End a process whose main thread does not come back, with the code of the first error.

    The line is printed, unless another rank has reported the error; ``before_exit`` is called with
    it, and the communicator is aborted.
    """
    error = error_propagation.resolve(error)
    code = error.exit_code if isinstance(error, UserError) else ExitCode.INTERNAL
    is_first = not isinstance(error, RemoteError)
    try:
        if is_first:
            run_with_timeout(_WRITE_S, partial(report_error, error))
        run_with_timeout(_WRITE_S, partial(leave_for_launcher, code, str(error), is_first=is_first))
        if error_propagation.before_exit:
            run_with_timeout(_RESULT_S, partial(error_propagation.before_exit, error))
        if error_propagation.farewell:
            error_propagation.farewell()
        run_with_timeout(_ABORT_S, abort_group)
    finally:
        os._exit(code)


def _communicator_error(device: torch.device) -> Exception | None:
    """Return the error that the backend reports; None if there is none, or it reports nothing."""
    if device.type == "cpu" or not dist.is_initialized():
        return None
    with suppress(Exception):  # a backend without get_error
        error = dist.group.WORLD._get_backend(device).get_error()  # type: ignore[union-attr]
        if error != ErrorType.SUCCESS:
            return dist.DistNetworkError(f"{dist.get_backend()} reports {error.name}")
    return None


def abort_group() -> None:
    """Abort the communicators of all groups, if there are any and their library can be aborted.

    Unlike ``destroy_process_group`` this does not wait for what is under way on the device.
    """
    if dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
        dist.distributed_c10d._abort_process_group()
