"""Out-of-memory errors of the device and of the host, by what the memory was for. No torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

from ddp_sgd.errors import ConfigError
from ddp_sgd.text import first_line

_ON_DEVICE = re.compile(
    r"(CUDA|HIP|XPU|MPS)\b.*out of memory|(CUBLAS|CUDNN|HIPBLAS|NCCL\w*)_STATUS_ALLOC_FAILED",
    re.IGNORECASE | re.DOTALL,
)
_ON_HOST = re.compile(r"can't allocate memory|Cannot allocate memory|std::bad_alloc")
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
    MODEL = (
        "model is too large",
        "make it smaller, start fewer ranks on a host, or take one with more memory",
    )
    MOMENTUM = (
        "optim.momentum needs a buffer as large as each parameter, which is too much",
        "set optim.momentum=0, or make the model smaller",
    )
    STEP = ("data.batch_size is too large", _SMALLER_BATCHES)
    EVALUATION = ("data.batch_size is too large, in an evaluation,", _SMALLER_BATCHES)
    SNAPSHOT = (
        "the state is too large to be copied for a checkpoint",
        "start fewer ranks on a host, or give the job more memory",
    )


@contextmanager
def memory_for(use: Use, where: str = "data.train") -> Iterator[None]:
    """Say what memory was for, where it runs out in the block.

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


def refuse_out_of_memory(error: Exception, use: Use, where: str = "data.train") -> None:
    """Raise an error that names the cause and the remedy, if memory ran out.

    Args:
        error: What was raised.
        use: What the memory is for.
        where: Key of the data set, for data.

    Raises:
        ConfigError: ``error`` says that memory of the device or of the host ran out.
    """
    if (text := describe_out_of_memory(error, use, where)) is not None:
        raise ConfigError(f"{text}.") from error


def describe_out_of_memory(error: Exception, use: Use, where: str = "data.train") -> str | None:
    """Return what is too large and the remedy, without a full stop; None for any other error."""
    text = str(error).strip()
    on_device = type(error).__name__ == "OutOfMemoryError" or _ON_DEVICE.search(text)
    if not (on_device or isinstance(error, MemoryError) or _ON_HOST.search(text)):
        return None
    what, remedy = use.value
    cause = first_line(error).rstrip(".")
    place = "device" if on_device else "host"
    return f"{what.format(where=where)} for the memory of the {place}: {cause}; {remedy}"
