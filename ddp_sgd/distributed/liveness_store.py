"""Liveness notes of all ranks in their store, and the report on a rank that hangs."""

import json
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeVar, cast

from torch.distributed.distributed_c10d import Store

from ddp_sgd.distributed.hang_report import HangReport, Note

T = TypeVar("T")


class LivenessStore:
    """Notes and one report in a store; no call waits longer than it is told to.

    A client of torch's store does not heed its own timeout while the host of the store is stopped:
    the wait times out, but what it then sends is answered by nobody. So a thread of the board talks
    to the store, and the caller waits for that thread as long as it likes.

    Args:
        store: Client for this board alone, since a client does one thing at a time.
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
            target=self._run_errands, args=(store,), name="ddp_sgd-board", daemon=True
        )
        self._thread.start()

    def exchange(self, note: Note, patience_s: float) -> HangReport | bool:
        """Write the own note, and read the report.

        Args:
            note: Of this rank.
            patience_s: Longest wait for the store, twice, in seconds.

        Returns:
            The report; True if there is none; False if the store is silent.
        """
        text = json.dumps(note)

        def errand(store: Store) -> bytes:
            store.set(f"note/{self._rank}", text)
            return store.get("report") if store.check(["report"]) else b""

        answer = self._ask(errand, patience_s)
        return HangReport(*json.loads(answer)) if answer else answer is not None

    def read_notes(self, patience_s: float) -> list[Note] | None:
        """Return the notes of all ranks, in their order, or None if the store is silent."""
        keys = [f"note/{rank}" for rank in range(self._world_size)]
        notes = self._ask(lambda store: store.multi_get(keys), patience_s)
        return [Note(*json.loads(note)) for note in notes] if notes else None

    def post(self, report: HangReport, patience_s: float) -> HangReport | None:
        """Write a report, unless there is one; return that which holds, None in silence."""
        text = json.dumps(report)
        answer = self._ask(lambda store: store.compare_set("report", "", text), patience_s)
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
