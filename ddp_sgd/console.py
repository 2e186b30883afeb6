"""Console output: prints that never end a run, and output that a command is called for. No torch.

A reader of a pipe leaves (``| head``), a connection is closed, the disk below a log is full, or
there is no console at all (``>&-``). What a run prints is for people, and the run goes on without
it: the failed stream is redirected to ``/dev/null``, so that nothing else fails on it, neither a
print of the user's own code nor the flush at the end of the interpreter.
"""

import argparse
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TextIO

from ddp_sgd.errors import ConfigError, OutputError, StoppedError


class Parser(argparse.ArgumentParser):
    """``argparse.ArgumentParser`` whose errors are those of a configuration, on one line."""

    def error(self, message: str) -> NoReturn:
        """Raise the error instead of leaving the process."""
        raise ConfigError(f"{message}; see {self.prog} --help.")


def say(line: str) -> None:
    """Print a line on stdout, if it is open; no failure is raised."""
    _print(sys.stdout, f"{line}\n")


def say_error(line: str) -> None:
    """Print a line on stderr after what is on its way to stdout; nothing is raised."""
    _print(sys.stdout, "")
    _print(sys.stderr, f"{line}\n")


def report_error(error: object, origin: str = "") -> None:
    """Print the one line of an error on stderr; nothing is raised.

    Args:
        error: What was raised, or its message. A run that was stopped on request is no error.
        origin: Traceback that is printed above it.
    """
    kind = "" if isinstance(error, StoppedError) else "error: "
    say_error(f"{origin}ddp_sgd: {kind}{error}")


def settle() -> None:
    """Write what is left in both streams, so that the exit code is that of the work alone."""
    _print(sys.stdout, "")
    _print(sys.stderr, "")


def deliver(text: str) -> None:
    """Print on stdout what a command was called for.

    Args:
        text: With its last newline. A reader that has left has read enough: that is no error.

    Raises:
        OutputError: It cannot be written, such as to a full disk.
    """
    try:
        _write(sys.stdout, text)
    except BrokenPipeError:
        silence(sys.stdout)
    except (OSError, ValueError) as error:
        silence(sys.stdout)
        reason = getattr(error, "strerror", None) or error
        raise OutputError(
            f"stdout is not writable: {reason}; send the output to a terminal, or to a file on a "
            "disk with room."
        ) from error


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream, which may be closed, is a terminal."""
    try:
        return stream is not None and stream.isatty()
    except (OSError, ValueError):
        return False


def silence(stream: TextIO | None) -> None:
    """Send what a stream still holds, and all that follows, nowhere.

    Args:
        stream: One that failed; one that is closed, or has no file below, is left as it is.
    """
    if stream is not None:
        with suppress(OSError, ValueError, AttributeError):
            _redirect_to_null(stream.fileno())


def outlive_console() -> None:
    """Have all code that prints in this process go on when its console fails, also the user's.

    The three standard descriptors are opened where they are closed: else the next file that is
    opened, such as the journal, would get what C code prints. ``sys.stdout`` and ``sys.stderr`` are
    replaced, unless other code has done so.
    """
    fill_descriptors()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _lasting(1 if name == "stdout" else 2))
        elif stream is getattr(sys, f"__{name}__") and not stream.closed:
            _print(stream, "")
            setattr(sys, name, _lasting(stream.fileno(), stream))


def fill_descriptors() -> None:
    """Open ``/dev/null`` as stdin, stdout and stderr, where they are closed."""
    for descriptor, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, mode)  # the lowest that is free: this one
            os.set_inheritable(null, True)  # noqa: FBT003  it takes no keyword


@contextmanager
def silent_descriptors() -> Iterator[None]:
    """Send what this process and those that it starts print to ``/dev/null`` meanwhile."""
    kept = [(number, os.dup(number)) for number in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in kept:
            os.dup2(null, number)
        yield
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(null)


class _LastingFile(io.FileIO):
    """A file whose writes do not fail: after an error it is ``/dev/null``."""

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:
                select.select([], [self], [])  # a full pipe that was set to non-blocking
        except OSError:
            _redirect_to_null(self.fileno())
            return memoryview(data).nbytes
        return written


def _lasting(descriptor: int, like: TextIO | None = None) -> TextIO:
    is_unbuffered = getattr(like, "write_through", True)  # with python -u
    return io.TextIOWrapper(
        io.BufferedWriter(_LastingFile(descriptor, "w", closefd=False)),
        encoding=like.encoding if like else "utf-8",
        errors="backslashreplace",
        line_buffering=is_unbuffered or getattr(like, "line_buffering", True),
    )


def _print(stream: TextIO | None, text: str) -> None:
    try:
        _write(stream, text)
    except Exception:  # any error of a stream of the user's own, too
        silence(stream)


def _write(stream: TextIO | None, text: str) -> None:
    """Write now, and what the encoding of the stream lacks as escapes.

    Raises:
        OSError: It cannot be written.
        ValueError: The stream is closed.
    """
    if stream is None:  # the descriptor was closed when Python started
        raise ValueError("it is closed")
    encoding = getattr(stream, "encoding", None) or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def _redirect_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, descriptor)
    finally:
        os.close(null)
