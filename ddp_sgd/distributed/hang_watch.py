"""Hang watch: a rank that makes no progress for ``hang_s`` is named, and all ranks end.

Liveness notes of all ranks in their store, and the report on a rank that hangs.
"""

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import NoReturn, TypeVar, cast

from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from ddp_sgd.console import report_error
from ddp_sgd.distributed.collectives import gather_over_ranks
from ddp_sgd.distributed.environment import is_orphaned
from ddp_sgd.distributed.process_exit import leave_for_launcher, run_with_timeout
from ddp_sgd.distributed.progress import (
    NOTE_S,
    HangReport,
    Note,
    Place,
    ProgressTracker,
    describe_hang,
    find_hung_ranks,
)
from ddp_sgd.distributed.rendezvous import StoreKey, is_agent_store
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ExitCode, PeerError
from ddp_sgd.host import scaled

T = TypeVar("T")

_REPORT = StoreKey.REPORT.of()


class LivenessStore:
    """Notes and one report in a store; no call waits longer than its timeout.

    A client of torch's store does not heed its own timeout while the host of the store is stopped:
    the wait times out, but its next request gets no reply. So a thread of its own uses the store,
    and the caller waits for that thread with a timeout.

    Args:
        store: Client for this alone, since a client does one thing at a time.
        rank: Number of this process.
        world_size: Number of processes.

    Attributes:
        is_gone: Whether the connection broke; it does not come back.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.is_gone = False
        self._rank = rank
        self._world_size = world_size
        self._errands: SimpleQueue[Callable[[Store], object] | None] = SimpleQueue()
        self._is_free = threading.Event()
        self._is_free.set()
        self._answer: object = None
        self._thread = threading.Thread(
            target=self._run_errands, args=(store,), name="ddp_sgd-liveness", daemon=True
        )
        self._thread.start()

    def exchange(self, note: Note, patience_s: float) -> HangReport | bool:
        """Write the own note, and read the report.

        Args:
            note: Of this rank.
            patience_s: Longest wait for the store, twice, in seconds.

        Returns:
            The report; True if there is none; False if the store does not respond.
        """
        text = json.dumps(note)

        def errand(store: Store) -> bytes:
            store.set(StoreKey.NOTE.of(self._rank), text)
            return store.get(_REPORT) if store.check([_REPORT]) else b""

        answer = self._ask(errand, patience_s)
        return HangReport(*json.loads(answer)) if answer else answer is not None

    def read_notes(self, patience_s: float) -> list[Note] | None:
        """Return the notes of all ranks, in their order, or None if the store does not respond."""
        keys = [StoreKey.NOTE.of(rank) for rank in range(self._world_size)]
        notes = self._ask(lambda store: store.multi_get(keys), patience_s)
        return [Note(*json.loads(note)) for note in notes] if notes else None

    def post(self, report: HangReport, patience_s: float) -> HangReport | None:
        """Write a report, unless there is one; return that which holds, None in silence."""
        text = json.dumps(report)
        answer = self._ask(lambda store: store.compare_set(_REPORT, "", text), patience_s)
        return HangReport(*json.loads(answer)) if answer else None

    def outlast_others(self, wait_s: float, patience_s: float) -> None:
        """Wait until every rank has left, at most so long: what the host of the store owes them."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            notes = self.read_notes(patience_s)
            if notes is None or all(note.left for note in notes):
                return
            time.sleep(0.02)

    def close(self, patience_s: float) -> None:
        """Drop the client, unless it waits for a host that is stopped."""
        self._errands.put(None)
        self._thread.join(patience_s)

    def _ask(self, errand: Callable[[Store], T], patience_s: float) -> T | None:
        if self.is_gone or not self._is_free.wait(patience_s):  # an earlier errand is under way
            return None
        self._is_free.clear()
        self._answer = None
        self._errands.put(errand)
        if not self._is_free.wait(patience_s):
            return None
        return cast("T | None", self._answer)

    def _run_errands(self, store: Store) -> None:
        while (errand := self._errands.get()) is not None:
            try:
                self._answer = errand(store)
            except Exception:  # the store went down with its host
                self.is_gone = True
            self._is_free.set()


_ORPHAN_POLL_S = 1.0
_LAST_CALL_S = scaled(2.0)
"""Longest wait for a store whose host was just woken."""
_PATIENCE_S = 0.5
"""Longest wait for a store that should respond at once, and for each part of leaving."""
_FAREWELL_S = scaled(5.0)
"""Longest wait of the store's host for the others to read the report."""
_WRITE_S = scaled(5.0)
"""Longest wait for the stacks, and for the line: what hangs may be the disk, or a full pipe."""
_LAST_WORDS_S = scaled(60.0)
"""Longest wait for ``on_hang``."""
_SILENT_POLLS = 5
"""Unanswered polls in a row after which the host of the store counts as frozen."""


@contextmanager
def watch_for_hangs(
    runtime: Runtime,
    progress: ProgressTracker,
    *,
    hang_s: float | None,
    stacks: Path | None,
    on_hang: Callable[[PeerError], None],
    on_orphaned: Callable[[], None],
) -> Iterator[None]:
    """End every process of the job if a rank hangs: its training thread makes no progress.

    All ranks enter together. A thread writes notes into the group's store; a rank without progress
    for almost ``hang_s`` finds the one with the least, and posts a report, upon which
    every rank writes down its stacks and ends with ``ExitCode.PEER``. Time counts as
    polls saw it pass: a job that is suspended as a whole, and goes on, does not hang.

    Args:
        runtime: This process.
        progress: What the training thread touches.
        hang_s: Longest time without progress, in seconds, at least 1; None only looks for
            the launcher.
        stacks: Folder for ``stack-rank-<rank>.txt``; made when needed. None writes none.
        on_hang: Called on every rank with the error, in a thread of its own and for a minute at
            most, before the process ends.
        on_orphaned: Called once, in a thread, if torchrun's agent that started this rank died.
    """
    watch = _Watch(runtime, progress, hang_s, stacks, on_hang, on_orphaned)
    try:
        yield
    finally:
        watch.leave()


class _Watch:
    """The thread of one rank; see ``watch_for_hangs``."""

    def __init__(
        self,
        runtime: Runtime,
        progress: ProgressTracker,
        hang_s: float | None,
        stacks: Path | None,
        on_hang: Callable[[PeerError], None],
        on_orphaned: Callable[[], None],
    ) -> None:
        self._rank = runtime.rank
        self._progress = progress
        self._hang_s = hang_s
        self._stacks = stacks
        self._on_hang = on_hang
        self._on_orphaned = on_orphaned
        self._has_launcher = True
        self._store_rank = None if is_agent_store(os.environ) or runtime.alone else 0
        self._interval_s = min(max(hang_s / 50, 0.05), NOTE_S) if hang_s else _ORPHAN_POLL_S
        self._patience_s = min(self._interval_s, _PATIENCE_S)
        # What passes between the last progress and a poll, and from there to the report.
        self._limit_s = max(hang_s - 3 * self._interval_s, hang_s / 2) if hang_s else float("inf")
        self._polls = self._silent_polls = 0
        self._ticks = progress.ticks
        self._idle_s = 0.0
        self._seen_at = time.monotonic()
        self._before: list[Note] | None = None
        self._next_look_s = self._limit_s / 2
        self._has_left = self._is_ending = False
        self._stop = threading.Event()
        self._places: list[Place] = []
        self._board: LivenessStore | None = None
        if hang_s:
            self._board = LivenessStore(
                runtime.store.clone() if runtime.store else HashStore(),
                runtime.rank,
                runtime.world_size,
            )
            self._board.exchange(self._note(), _LAST_CALL_S)  # before any rank reads
            self._places = gather_over_ranks((socket.gethostname(), os.getpid()), runtime)
        self._thread = threading.Thread(target=self._run, name="ddp_sgd-watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """End the thread; if the job is being ended, stay until this process is."""
        self._stop.set()
        self._thread.join(2 * _PATIENCE_S)
        if self._is_ending:
            threading.Event().wait()  # else this thread would report the peers that it lost
        self._has_left = True
        if self._board:
            self._board.close(_PATIENCE_S)

    def _run(self) -> None:
        self._seen_at = time.monotonic()
        while not self._stop.wait(self._interval_s):
            with suppress(Exception):  # a watch that fails must not take the run along
                self._poll()
        if self._board:
            # What ended the training thread may be peers that left upon a report of a hang.
            found = self._board.exchange(self._note(left=True), _PATIENCE_S / 2)
            if isinstance(found, HangReport) and not self._has_left:
                self._end(found)

    def _poll(self) -> None:
        self._polls += 1
        if self._has_launcher and is_orphaned(os.environ):
            self._has_launcher = False
            self._on_orphaned()
        if self._board is None:
            return
        self._measure_idleness()
        found = self._board.exchange(self._note(), self._patience_s)
        if isinstance(found, HangReport):
            self._end(found)
        self._silent_polls = 0 if found else self._silent_polls + 1
        if self._idle_s >= self._next_look_s:
            self._look_around(self._board)

    def _measure_idleness(self) -> None:
        now, before = time.monotonic(), self._seen_at
        self._seen_at = now
        if self._ticks == self._progress.ticks:
            self._idle_s += min(now - before, 2 * self._interval_s)  # a suspended job is not idle
            return
        self._ticks = self._progress.ticks
        self._idle_s = 0.0
        self._before = None
        self._next_look_s = self._limit_s / 2

    def _look_around(self, liveness: LivenessStore) -> None:
        """Read the notes, at half of the limit and at the limit, and judge at the latter."""
        notes = liveness.read_notes(self._patience_s)
        is_over = self._idle_s >= self._limit_s
        if notes is None:
            if is_over and (liveness.is_gone or self._silent_polls >= _SILENT_POLLS):
                self._end(self._resolve_in_silence(liveness))
            return
        if is_over:
            hung_ranks, frozen = find_hung_ranks(self._before, notes, self._limit_s)
            if hung_ranks:
                self._end(self._post(liveness, hung_ranks, notes, frozen=frozen))
            self._next_look_s = self._idle_s + self._limit_s / 4
        else:
            self._next_look_s = self._limit_s
        self._before = notes

    def _resolve_in_silence(self, liveness: LivenessStore) -> HangReport:
        """Report the rank that hosts the store, if it wakes; else end alone."""
        self._is_ending = True
        host = self._store_rank
        if host is not None and host != self._rank and not liveness.is_gone:
            self._wake([host])
            if notes := liveness.read_notes(_LAST_CALL_S):
                return self._post(liveness, [host], notes, frozen=True)
        here = self._places[self._rank][0]
        near = [rank for rank, place in enumerate(self._places) if place[0] == here]
        place = f"the store of {'the launcher' if host is None else f'rank {host}'}"
        message = (
            f"rank {self._rank} of {len(self._places)} on host {here} is stuck, with no progress "
            f'for {self._hang_s:g} s in phase "{self._progress.phase}" of step '
            f"{self._progress.step}, "
            f"and {place} does not answer; look at what became of that process and its host, then "
            "start again."
        )
        return HangReport(message, min((r for r in near if r != host), default=self._rank), [])

    def _post(
        self, liveness: LivenessStore, hung_ranks: list[int], notes: list[Note], *, frozen: bool
    ) -> HangReport:
        self._is_ending = True  # even if the training thread goes on meanwhile
        message = describe_hang(
            hung_ranks,
            notes,
            self._places,
            frozen=frozen,
            hang_s=self._hang_s or 0.0,
            stacks=self._stacks,
        )
        report = HangReport(message, self._rank, hung_ranks)
        return liveness.post(report, _LAST_CALL_S) or report

    def _end(self, report: HangReport) -> NoReturn:
        self._is_ending = True
        try:
            self._wake(report.hung_ranks)  # so that they read the report, too
            run_with_timeout(_WRITE_S, self._write_stacks)
            if self._board:
                self._board.exchange(self._note(left=True), _LAST_CALL_S)
            if report.reporter == self._rank:
                run_with_timeout(_WRITE_S, lambda: report_error(report.message))
            run_with_timeout(_WRITE_S, lambda: self._leave_for_launcher(report))
            run_with_timeout(_LAST_WORDS_S, lambda: self._on_hang(PeerError(report.message)))
            if self._board and self._rank == self._store_rank:
                self._board.outlast_others(_FAREWELL_S, _LAST_CALL_S)
        finally:
            os._exit(ExitCode.PEER)

    def _leave_for_launcher(self, report: HangReport) -> None:
        is_first = self._rank in (report.hung_ranks or [report.reporter])
        leave_for_launcher(ExitCode.PEER, report.message, is_first=is_first)

    def _note(self, *, left: bool = False) -> Note:
        progress = self._progress
        return Note(progress.step, progress.phase, progress.count, self._idle_s, self._polls, left)

    def _wake(self, ranks: list[int]) -> None:
        for rank in ranks:
            host, process = self._places[rank]
            if host == socket.gethostname():
                with suppress(OSError):
                    os.kill(process, signal.SIGCONT)

    def _write_stacks(self) -> None:
        if self._stacks:
            self._stacks.mkdir(parents=True, exist_ok=True)
            with (self._stacks / f"stack-rank-{self._rank}.txt").open("w") as file:
                faulthandler.dump_traceback(file)
