"""Exceptions for users, each with the exit code of the contract."""

from enum import IntEnum
from pathlib import Path

from ddp_sgd.text import mask


class ExitCode(IntEnum):
    """How a command ended; part of the contract with launch and batch scripts.

    Source:
        The numbers from 64 to 77 follow ``sysexits.h`` of BSD where it has a word for the case.
    """

    DONE = 0
    CONFIG = 64
    DATA = 65
    PEER = 69
    INTERNAL = 70
    OUTPUT = 73
    STOPPED = 75
    DIVERGED = 76
    REFUSED = 77


class UserError(Exception):
    """An error that the user can fix; the message gives the remedy.

    The message reads ``WHERE is WHAT; REMEDY``, on one line. Raise one of the subclasses.

    Attributes:
        exit_code: What the command returns when this error ends it.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(self, message: str) -> None:
        """Fold the message onto one line, which a log collector keeps together; mask secrets."""
        super().__init__(mask(" ".join(message.split())))


class ConfigError(UserError):
    """The configuration, the command line or the environment has an invalid value."""

    exit_code = ExitCode.CONFIG


class DataError(UserError):
    """A data set cannot be read, is empty, or does not fit the model."""

    exit_code = ExitCode.DATA


class LostWorkerError(DataError):
    """A process that reads samples was killed."""


class PeerError(UserError):
    """Another rank, or the rendezvous endpoint of the ranks, cannot be reached."""

    exit_code = ExitCode.PEER


class OutputError(UserError):
    """The run folder cannot be written."""

    exit_code = ExitCode.OUTPUT


class DeviceError(UserError):
    """The accelerator failed; the cause may lie in an earlier operation."""

    exit_code = ExitCode.INTERNAL


class DivergedError(UserError):
    """The gradients stopped being finite."""

    exit_code = ExitCode.DIVERGED


class RefusedError(UserError):
    """Going on could harm something of the user's."""

    exit_code = ExitCode.REFUSED


class StoppedError(UserError):
    """A run was stopped on request before its first step; it is no failure."""

    exit_code = ExitCode.STOPPED


class StopInterrupt(BaseException):
    """Raised in the main thread by a signal before the first step.

    Like KeyboardInterrupt it is no ``Exception``, so that code which handles the errors of a data
    set or a model does not take it for one. ``as_error`` gives what the run ends with.

    Args:
        reason: Name of the signal.

    Attributes:
        is_caught: Whether a handler has begun to end the run.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.is_caught = False
        self._reason = reason

    def as_error(self) -> StoppedError:
        """Return the error that the run ends with."""
        self.is_caught = True
        return StoppedError(
            f"stopped by {self._reason} before the first step; start again to go on."
        )


class RepeatedFailureError(UserError):
    """Earlier attempts of a run failed at one and the same step, and so would this one.

    Args:
        message: What the user reads.
        exit_code: The code of the last failure.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        """Take over the code of the failure."""
        super().__init__(message)
        self.exit_code = ExitCode(exit_code)


class RemoteError(UserError):
    """Another rank failed first and reported it; this one ends with the same code, without output.

    Args:
        message: The line which the other rank printed.
        exit_code: The code with which the other rank ends.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        """Take over the code of the rank that failed."""
        super().__init__(message)
        self.exit_code = ExitCode(exit_code)


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return the error of a path that cannot be written."""
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}; set output_dir to a folder that you "
        "may write, with room on its disk."
    )
