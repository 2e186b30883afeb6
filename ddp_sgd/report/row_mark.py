"""How far a W&B run has got its rows, kept so that a resumed run sends none of them twice."""

import os
from pathlib import Path
from zlib import crc32

from ddp_sgd.report.logger import Row

NOWHERE = -1
"""The place before every row."""

NO_BEST = float("-inf")
"""The best of no accuracies."""


def place_of(event: str, row: Row) -> int:
    """Number the rows of a run in the order in which they come, the same after every resume.

    Args:
        event: ``train`` or ``eval``; a row of training comes before the one of evaluation after
            the same samples.
        row: The row; without ``samples`` it counts as the run's first.

    Returns:
        ``2 * samples``, plus 1 for an evaluation.
    """
    samples = row.get("samples")
    return 2 * (samples if isinstance(samples, int) else 0) + (event == "eval")


class RowMark:
    """High-water mark of the rows that were given away, in a file of one line.

    It is written in one piece and never synced to disk: it survives the end of the process, however
    sudden, and nobody waits for it. A file that is missing, torn or out of reach says that nothing
    is known, and a mark that can't be written is given up: neither stops anybody.

    Args:
        path: Where the mark is kept.
        resumed: Whether the run goes on from an earlier life; otherwise the mark starts again.

    Attributes:
        place: ``place_of`` the last row; ``NOWHERE`` if none is known.
        online: Whether the life that gave the last row away gave it to a server, so that the server
            knows better what it has.
        best: Best accuracy among the rows; ``NO_BEST`` if none is known.
    """

    def __init__(self, path: Path, *, resumed: bool) -> None:
        """Read the mark of earlier lives, and open the file for this one."""
        self.place, self.online, self.best = NOWHERE, False, NO_BEST
        self._descriptor: int | None = None
        try:
            path.parent.mkdir(exist_ok=True)
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if resumed:
                self._read(os.pread(self._descriptor, 4096, 0))
            else:
                os.ftruncate(self._descriptor, 0)
        except OSError:
            self.close()

    def reached(self, on_server: int | None) -> int:
        """Give the place of the last row that W&B has, or will have after ``wandb sync``.

        Args:
            on_server: Place of the last row of the run on the server; None if it was not asked.
        """
        if on_server is None:
            return self.place
        # What was on its way to a server when the process was killed has not come to it.
        return on_server if self.online else max(self.place, on_server)

    def put(self, place: int, *, online: bool, best: float) -> None:
        """Keep a row's place, whether it went to a server, and the best accuracy so far."""
        self.place, self.online, self.best = place, online, best
        if self._descriptor is None:
            return
        try:
            os.pwrite(self._descriptor, _line(place, online, best), 0)
        except OSError:
            self.close()

    def close(self) -> None:
        """Close the file; the mark goes on in memory."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def _read(self, line: bytes) -> None:
        try:
            place, online, best, _ = line.split()
            kept = int(place), bool(int(online)), float(best)
        except ValueError:
            return
        if line == _line(*kept):
            self.place, self.online, self.best = kept


def _line(place: int, online: bool, best: float) -> bytes:  # noqa: FBT001  two callers, above
    """Give the line, of the same length for all values, so that a new one covers the old one."""
    text = f"{place:020d} {online:d} {best!r:>24}"
    return f"{text} {crc32(text.encode()):08x}\n".encode()
