"""Exceptions for users, each with its exit code, and what torch's errors become of them. No torch.

Errors of torch and of the operating system are recognized by their texts, which stand in one table,
``Cause``: they change with releases of torch.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum, IntEnum
from pathlib import Path

from ddp_sgd.text import first_line, mask


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


class EarlierError(UserError):
    """An error that another process ran into before.

    Args:
        message: What the user reads, or has read from that process.
        exit_code: The code with which it ended.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        """Take over the code of the failure."""
        super().__init__(message)
        self.exit_code = ExitCode(exit_code)


class RepeatedFailureError(EarlierError):
    """Earlier attempts of a run failed at one and the same step, and so would this one."""


class RemoteError(EarlierError):
    """Another rank failed first and reported it; this one ends with its code, without output."""


def unwritable(path: Path, error: OSError) -> OutputError:
    """Return the error of a path that cannot be written."""
    return OutputError(
        f"{path} cannot be written: {error.strerror or error}; set output_dir to a folder that you "
        "may write, with room on its disk."
    )


class Cause(Enum):
    """What an error is about, by the texts that torch or the system has for it, in any case."""

    DEVICE_MEMORY = (
        r"(CUDA|HIP|XPU|MPS)\b.*out of memory|(CUBLAS|CUDNN|HIPBLAS|NCCL\w*)_STATUS_ALLOC_FAILED"
    )
    HOST_MEMORY = r"can't allocate memory|Cannot allocate memory|std::bad_alloc"
    LABEL = (
        r"device-side assert"
        r"|Target -?\d+ is out of bounds"  # cross_entropy, nll_loss
        r"|target out of range"  # multi_margin_loss
        r"|Class values must be"  # one_hot
    )
    EMBEDDING_INDEX = r"index out of range in self"
    UNUSED_PARAMETERS = r"finished reduction in the prior iteration"
    LOST_WORKER = (
        r"DataLoader worker|Pin memory thread|Too many open files|shared memory"
        r"|unable to (open|mmap|resize)"
    )
    LOST_PEER = (
        r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|pair closure"
        r"|Socket Timeout|wait timeout|gloo/transport|ncclRemoteError|ncclSystemError|watchdog|NCCL"
    )
    SILENT_PEER = r"Timed out|timeout|No route|unreachable"
    PORT_IN_USE = r"EADDRINUSE"

    def is_in(self, error: BaseException) -> bool:
        """Whether the text of an error names this cause."""
        return re.search(self.value, str(error), re.IGNORECASE | re.DOTALL) is not None


_SMALLER_BATCHES = (
    "lower data.batch_size and raise data.accumulate by the same factor: the steps stay the same"
)


class Use(Enum):
    """What memory is for: what is too large, and what to do about it."""

    DATA = (
        "{where} is too large",
        "let the data set read samples when they are asked for, start fewer ranks on a host, or "
        "give the job more memory",
    )
    DATA_ON_DEVICE = ("{where} is too large", "set data.device=host")
    MODEL = (
        "model is too large",
        "make it smaller, start fewer ranks on a host, or take one with more memory",
    )
    MOMENTUM = (
        "optim.momentum needs a buffer as large as each parameter, which is too much",
        "set optim.momentum=0, or make the model smaller",
    )
    STEP = ("data.batch_size is too large", _SMALLER_BATCHES)
    EVALUATION = (
        "eval.batch_size, which is data.batch_size where it is null, is too large",
        "set a smaller eval.batch_size: the scores stay the same but for rounding",
    )
    SNAPSHOT = (
        "the state is too large to be copied for a checkpoint",
        "start fewer ranks on a host, or give the job more memory",
    )


@contextmanager
def memory_for(use: Use, where: str = "data.train") -> Iterator[None]:
    """Report what memory was for, where it runs out in the block.

    Args:
        use: What the memory is for.
        where: Key of the data set, for data.

    Raises:
        ConfigError: Memory ran out; other errors, and those of an inner block, pass unchanged.
    """
    try:
        yield
    except Exception as error:
        refuse_out_of_memory(error, use, where)
        raise


def refuse_out_of_memory(
    error: Exception,
    use: Use,
    where: str = "data.train",
    batch: tuple[int, int] | None = None,
) -> None:
    """Raise an error that names the cause and the remedy, if memory ran out.

    Args:
        error: What was raised.
        use: What the memory is for.
        where: Key of the data set, for data.
        batch: ``data.batch_size`` and ``data.accumulate``, for a step; None: not known.

    Raises:
        ConfigError: ``error`` reports that memory of the device or of the host ran out.
    """
    if (text := describe_out_of_memory(error, use, where, batch)) is not None:
        raise ConfigError(f"{text}.") from error


def describe_out_of_memory(
    error: Exception,
    use: Use,
    where: str = "data.train",
    batch: tuple[int, int] | None = None,
) -> str | None:
    """Return what is too large and the remedy, without a full stop; None for any other error."""
    if isinstance(error, UserError):  # of an inner block, which has named what was too large
        return None
    on_device = type(error).__name__ == "OutOfMemoryError" or Cause.DEVICE_MEMORY.is_in(error)
    if not (on_device or isinstance(error, MemoryError) or Cause.HOST_MEMORY.is_in(error)):
        return None
    what, remedy = use.value
    if batch is not None and use is Use.STEP:
        what = f"data.batch_size is {batch[0]}, a micro-batch that is too large"
        remedy = _smaller_batch(*batch)
    cause = first_line(error).rstrip(".")
    place = "device" if on_device else "host"
    return f"{what.format(where=where)} for the memory of the {place}: {cause}; {remedy}"


def _smaller_batch(batch_size: int, accumulate: int) -> str:
    """Return the largest micro-batch below this one that takes the same steps, as settings."""
    factor = next((n for n in range(2, batch_size + 1) if batch_size % n == 0), None)
    if factor is None:
        return "make the model or the samples smaller, or take a device with more memory"
    return (
        f"set data.batch_size={batch_size // factor} data.accumulate={accumulate * factor}, which "
        "keeps the steps the same"
    )


@contextmanager
def translate_errors(
    stop_reason: Callable[[], str | None] = lambda: None, batch: tuple[int, int] | None = None
) -> Iterator[None]:
    """Translate the errors that a configuration can fix; others pass unchanged.

    Args:
        stop_reason: Returns the reason of a stop request, None if there is none; a loader process
            that ends along with it is no error.
        batch: ``data.batch_size`` and ``data.accumulate`` of the steps; None: not known.

    Raises:
        ConfigError: Parameters without a gradient, or too little memory.
        DataError: A label out of range, an index that an embedding lacks, or a loader process that
            was killed.
        DeviceError: The device reports another error.
        StoppedError: A loader process was killed, and this one has a stop request.
    """
    try:
        with _lost_workers(stop_reason):
            yield
    except (RuntimeError, IndexError, MemoryError) as error:
        refuse_out_of_memory(error, Use.STEP, batch=batch)
        if translated := _translate(error):
            raise translated from error
        raise


def _translate(error: Exception) -> UserError | None:
    if Cause.UNUSED_PARAMETERS.is_in(error):
        return unused_parameters()
    if Cause.LABEL.is_in(error):
        return DataError(
            f"a batch has a label that the model has no score for: {first_line(error)}; number the "
            "labels from 0 to the number of classes less one."
        )
    if Cause.EMBEDDING_INDEX.is_in(error):
        return DataError(
            "a batch has an index, such as that of a word, for which an embedding of the model has "
            "no row; number the indices from 0, or set num_embeddings of the embedding to their "
            "number."
        )
    if any(kind.__name__ == "AcceleratorError" for kind in type(error).__mro__):
        return DeviceError(
            f"the device reports: {first_line(error)}; set CUDA_LAUNCH_BLOCKING=1 and run "
            "again with --debug, which then shows where."
        )
    return None


def unused_parameters() -> ConfigError:
    """Return the error of a step that left parameters without a gradient."""
    return ConfigError(
        "parallel.find_unused_parameters is false, but a step left parameters of the model "
        "without a gradient; set parallel.find_unused_parameters=true, or "
        "remove the parameters."
    )


@contextmanager
def _lost_workers(stop_reason: Callable[[], str | None]) -> Iterator[None]:
    """Distinguish a loader process that was killed from one that a stop has ended, too."""
    try:
        yield
    except (RuntimeError, LostWorkerError) as error:
        lost = error if isinstance(error, LostWorkerError) else lost_worker(error)
        if lost is None:
            raise
        if (reason := stop_reason()) is None:
            raise lost from error
        raise StoppedError(
            f"stopped by {reason}, which ended a loader process in the middle of a step; "
            "start again to go on from the newest checkpoint."
        ) from error


def lost_worker(error: Exception) -> LostWorkerError | None:
    """Translate an error that reports a killed loader process; None for any other error.

    torch raises that wherever the main thread is. A process that is killed while it sends
    a batch shows as a broken connection.
    """
    if not (isinstance(error, (EOFError, ConnectionError)) or Cause.LOST_WORKER.is_in(error)):
        return None
    cause = first_line(error)
    return LostWorkerError(
        f"data.workers lost a process: {cause}; lower data.workers, or give the job more memory."
    )
