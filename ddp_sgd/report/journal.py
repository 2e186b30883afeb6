"""Journal: ``metrics.jsonl``, one JSON object per line; the logger protocol.

All other loggers follow the journal, or get the rows that it gets.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import IO, Any, Protocol

from ddp_sgd.config import RunConfig
from ddp_sgd.errors import DataError, unwritable
from ddp_sgd.files import replace_file
from ddp_sgd.plan import Plan
from ddp_sgd.report.run_folder import translate_os_errors

FILE_NAME = "metrics.jsonl"

Value = float | int | str | None
Row = Mapping[str, Value]
EventRow = tuple[str, Row]

_ENCODE = json.JSONEncoder(allow_nan=False, check_circular=False).encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where this attempt of a run begins: at step 0, or where it is resumed.

    Args:
        run_id: Identity of the run, 8 letters and digits; the same after every resume, also in W&B.
        has_rows: Whether there is a journal of an earlier attempt.
        is_resumed: Whether the run goes on from something.
        step: Steps that were taken before.
        epoch: Passes over the data before.
        samples: Samples that were trained before.
        is_scored: Whether the evaluation at this place was done.
        note: What the row ``resume`` has about the checkpoint.
    """

    run_id: str
    has_rows: bool = False
    is_resumed: bool = False
    step: int = 0
    epoch: float = 0.0
    samples: int = 0
    is_scored: bool = False
    note: Row = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """What is known about a run before its first step.

    Args:
        folder: The run folder, which exists.
        config: Resolved configuration.
        plan: The run's arithmetic.
        origin: Where this attempt begins.
        notes: What the user should know, one line each.
    """

    folder: Path
    config: RunConfig
    plan: Plan
    origin: Origin
    notes: tuple[str, ...] = ()


class Logger(Protocol):
    """One way out for measurements; only rank 0 has loggers."""

    def start(self, record: RunRecord) -> None:
        """Open the outlet; called once, before the first row."""

    def write(self, rows: Sequence[EventRow]) -> None:
        """Take a burst of rows, in the order in which they came.

        Args:
            rows: Pairs of an event (``start``, ``resume``, ``train``, ``eval``, ``checkpoint``,
                ``stop`` or ``end``) and its row: values by name. Each row has ``time`` (unix s),
                ``step``, ``epoch`` (real) and ``samples``; a measurement that is not finite comes
                as None.
        """

    def finish(self, result: Mapping[str, Any]) -> None:
        """Close the outlet; called once, also when the run failed, if it was opened.

        Args:
            result: The content of ``result.json``.
        """


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
        origin = record.origin
        if origin.has_rows:
            plan = record.plan
            is_over = origin.samples == plan.samples_at(plan.total_steps)
            _cut_back(self._path, origin.samples, is_scored=origin.is_scored, is_over=is_over)
        with translate_os_errors(self._path):
            # Unbuffered: a line that met a full disk is not tried again when the file is closed.
            self._file = self._path.open("ab", buffering=0)

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
        stream, self._file = self._file, None
        if stream is not None:
            with translate_os_errors(self._path):
                stream.close()


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
            is_over: Whether the writer has ended: a last line without its newline then counts,
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
        if self._stream is not None:
            yield from _read_rows(self._stream, self._path, is_over=is_over)

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


def place_of(row: Mapping[str, Any]) -> int | None:
    """Number a row of training or evaluation by its place in the run, the same after every resume.

    Returns:
        ``2 * samples``, plus 1 for an evaluation, which comes after the row of training of the same
        samples, plus 2 for that of the test set at the end; None for any other row.
    """
    event, samples = row.get("event"), row.get("samples")
    if event not in ("train", "eval"):
        return None
    return 2 * (samples if isinstance(samples, int) else 0) + int(event == "eval") + _is_test(row)


def _is_test(row: Mapping[str, Any]) -> bool:
    return "test/count" in row


def _cut_back(path: Path, samples: int, *, is_scored: bool, is_over: bool) -> None:
    """Keep the rows up to a place in the run, in a new file that takes the place of the old.

    Args:
        path: The journal.
        samples: Samples trained up to that place.
        is_scored: Whether the evaluation at that very place was done; if not it is to come.
        is_over: Whether the run ends there: then the test set is scored again.
    """
    rows = [
        row
        for row in read_journal(path)
        if row["samples"] < samples
        or (
            row["samples"] == samples
            and (is_scored or row["event"] != "eval")
            and not (is_over and _is_test(row))
        )
    ]
    with translate_os_errors(path):
        replace_file(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a journal.

    The last line may be torn, as a run that was killed leaves it; it is then left out.

    Raises:
        DataError: The file cannot be read, or another line is no JSON object.
    """
    try:
        with path.open("rb") as stream:
            return list(_read_rows(stream, path, is_over=True))
    except OSError as error:
        raise _unreadable(path, error) from error


def _read_rows(stream: IO[bytes], path: Path, *, is_over: bool) -> Iterator[dict[str, Any]]:
    """Read rows from where a stream stands to the last whole one, and leave it behind that."""
    while True:
        start, line = stream.tell(), stream.readline()
        row, is_whole = _parse(line), line.endswith(b"\n")
        if is_whole and row is None:
            stream.seek(0)
            number = stream.read(start).count(b"\n") + 1
            raise DataError(
                f"{path}:{number} is not a JSON object; take the line out, or restore the file."
            )
        if row is None or not (is_whole or is_over):
            stream.seek(start)
            return
        yield row


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
