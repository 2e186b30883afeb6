"""Asynchronous writer: rows are written by a thread, off the path of the step."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

BURST_S = 0.1
"""How long rows gather before they are written together. Each time the writing thread takes the
interpreter from the training thread costs both a switch: few long turns are cheaper than many."""

MOST_ROWS = 10_000
"""Rows that may wait for a slow disk; then training waits, since none may be lost."""

Note = TypeVar("Note")


class AsyncWriter(Generic[Note]):
    """Hands over what it is given in a thread of its own, in order, in bursts.

    Args:
        write: Takes the notes of a burst. What it raises comes up in the next ``put`` or ``flush``,
            and the rest of that burst is lost.
    """

    def __init__(self, write: Callable[[list[Note]], None]) -> None:
        """Start the thread."""
        self._write = write
        self._waiting: deque[Note] = deque()
        self._turn = threading.Lock()
        self._arrived, self._over = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="ddp_sgd-async-writer", daemon=True)
        self._thread.start()

    def put(self, note: Note) -> None:
        """Take a note, which must not change any more; waits only if too many wait already."""
        self._waiting.append(note)
        if self._failure or len(self._waiting) >= MOST_ROWS:
            self.flush()
        elif not self._arrived.is_set():
            self._arrived.set()

    def flush(self) -> None:
        """Return when all notes so far are written; this thread writes what is left itself."""
        with self._turn:
            self._write_burst()
            failure, self._failure = self._failure, None
        if failure:
            raise failure

    def catch_up(self) -> None:
        """Return when all notes so far were given; what failed comes up in the others' calls."""
        with self._turn:
            self._write_burst()

    def close(self) -> None:
        """Write what is left, and end the thread."""
        self._over.set()
        self._arrived.set()
        self._thread.join()
        self.flush()

    def _work(self) -> None:
        while not self._over.is_set():
            self._arrived.wait()
            self._over.wait(BURST_S)
            self._arrived.clear()  # before the look: what comes during it has another turn
            with self._turn:
                self._write_burst()

    def _write_burst(self) -> None:
        burst = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not burst:
            return
        try:
            self._write(burst)
        except Exception as error:  # whatever it is, it belongs to the thread that trains
            self._failure = self._failure or error
