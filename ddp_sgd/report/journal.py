"""Journal: ``metrics.jsonl``, one JSON object per line, which all other loggers follow."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from ddp_sgd.errors import DataError, unwritable
from ddp_sgd.files import replace_file
from ddp_sgd.report.logger import EventRow, RunRecord

FILE_NAME = "metrics.jsonl"

_ENCODE = json.JSONEncoder(allow_nan=False, check_circular=False).encode


class Journal:
    """Writes rows past every buffer of ours, so that a kill loses at most the line being written.

    Unlike the other loggers it does raise: a run that cannot be written down must end.
    """

    def __init__(self) -> None:
        """Open nothing yet."""
        self._path = Path(FILE_NAME)
        self._file: FileIO | None = None

    def start(self, record: RunRecord) -> None:
        """Open the file; rows of steps that a resumed run takes again are cut off first.

        Raises:
            OutputError: It cannot be written.
            DataError: It is damaged.
        """
        self._path = record.folder / FILE_NAME
        if record.resumed:
            _cut_back(self._path, record.samples, is_scored=record.is_scored)
        try:
            # Unbuffered: a line that met a full disk is not tried again when the file is closed.
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            raise unwritable(self._path, error) from error

    def write(self, rows: Sequence[EventRow]) -> None:
        """Append a line for each row: its event, then the row as it is.

        Raises:
            OutputError: A line cannot be written, for instance to a full disk.
        """
        if self._file is None:
            raise RuntimeError(f"rows {rows!r} came before the journal was started")
        text = "".join([f"{_ENCODE({'event': event, **row})}\n" for event, row in rows])
        lines, written = text.encode(), 0
        try:
            while written < len(lines):
                written += self._file.write(lines[written:])
        except OSError as error:
            torn = written - (lines.rfind(b"\n", 0, written) + 1)
            with suppress(OSError):  # no torn line in the middle, should another one fit
                self._file.truncate(os.fstat(self._file.fileno()).st_size - torn)
            raise unwritable(self._path, error) from error

    def finish(self, result: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Close the file.

        Raises:
            OutputError: The file system reports a failure of an earlier write.
        """
        if self._file is None:
            return
        try:
            self._file.close()
        except OSError as error:
            raise unwritable(self._path, error) from error
        finally:
            self._file = None


class JournalTail:
    """Follows a journal that another process writes, as ``tail -F`` does.

    A journal that a resumed run has cut back, and so replaced, is read again from its beginning.

    Args:
        path: The journal; it may be missing.
    """

    def __init__(self, path: Path) -> None:
        """Read nothing yet."""
        self._path = path
        self._stream: IO[bytes] | None = None

    def read(self, *, is_over: bool) -> Iterator[dict[str, Any]]:
        """Read the rows that were appended since the last call.

        Args:
            is_over: Whether nobody writes any more: a last line without its newline then counts,
                if it is a row.

        Raises:
            DataError: A line is no JSON object.
        """
        try:
            self._open()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unreadable(self._path, error) from error
        stream = self._stream
        while stream is not None:
            start = stream.tell()
            line = stream.readline()
            row = _parse(line)
            if line.endswith(b"\n") and row is None:
                raise DataError(
                    f"{self._path} holds a line at byte {start} that is not a JSON object; take "
                    "the line out, or restore the file."
                )
            if row is None or not (line.endswith(b"\n") or is_over):
                stream.seek(start)
                return
            yield row

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    def _open(self) -> None:
        """Open the file by its name again: on NFS only that shows what another host has written.

        The file that was open before stays open meanwhile, so that its inode number is not free
        for the one that replaces it.
        """
        stream = self._path.open("rb")
        before, self._stream = self._stream, stream
        if before is not None:
            old, new = os.fstat(before.fileno()), os.fstat(stream.fileno())
            if os.path.samestat(old, new) and before.tell() <= new.st_size:
                stream.seek(before.tell())
            before.close()


def has_journal(folder: Path) -> bool:
    """Whether a run has written rows into a folder."""
    path = folder / FILE_NAME
    return path.is_file() and path.stat().st_size > 0


def first_row(folder: Path) -> dict[str, Any]:
    """Read the row that a run began with; empty if there is none."""
    try:
        with (folder / FILE_NAME).open("rb") as stream:
            return _parse(stream.readline()) or {}
    except OSError:
        return {}


def _cut_back(path: Path, samples: int, *, is_scored: bool) -> None:
    """Keep the rows up to a place in the run, in a new file that takes the place of the old.

    Args:
        path: The journal.
        samples: Samples trained up to that place.
        is_scored: Whether the evaluation at that very place was done; if not it is to come.
    """
    rows = [
        row
        for row in read_journal(path)
        if row["samples"] < samples
        or (row["samples"] == samples and (is_scored or row["event"] != "eval"))
    ]
    try:
        replace_file(path, "".join(f"{json.dumps(row)}\n" for row in rows))
    except OSError as error:
        raise unwritable(path, error) from error


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a journal.

    The last line may be torn, as a run that was killed leaves it; it is then left out.

    Raises:
        DataError: The file cannot be read, or another line is no JSON object.
    """
    try:
        *lines, last = path.read_bytes().split(b"\n")
    except OSError as error:
        raise _unreadable(path, error) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None:
            raise DataError(
                f"{path}:{number} is not a JSON object; take the line out, or restore the file."
            )
        rows.append(row)
    torn_or_whole = _parse(last)
    return rows if torn_or_whole is None else [*rows, torn_or_whole]


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"{path} is not readable ({error.strerror}); name the metrics.jsonl of a run folder."
    )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
