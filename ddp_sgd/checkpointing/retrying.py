"""Retry of reads after an I/O error, as a network file system fails for a moment. No torch.

A file that cannot be read is not a file that is damaged: a later attempt may find it whole. So it
is read again, and if that does not help, the caller gets the error.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import TypeVar

from ddp_sgd.errors import DataError

T = TypeVar("T")

PAUSES_S = (0.1, 0.3, 1.0)
"""Pauses between attempts. A stale handle is gone when the name is looked up again; a server that
fails over may take longer than a start should wait.
"""

_MISSING = (
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
"""There is no file of that name: that is an answer."""

_FINAL = (*_MISSING, errno.EACCES, errno.EPERM)
"""The same answer comes again a second later."""


def retry(read: Callable[[], T]) -> T:
    """Read; after an error that may pass, such as ESTALE, EIO or ETIMEDOUT, read again.

    Args:
        read: Opens the file by its name, and reads it from the beginning.

    Raises:
        OSError: The file is missing or not allowed, or the last of the attempts failed, too.
    """
    for pause in PAUSES_S:
        try:
            return read()
        except OSError as error:
            if error.errno is None or error.errno in _FINAL:
                raise
            sleep(pause)
    return read()


def is_missing(error: OSError) -> bool:
    """Whether an error says that there is no such file, rather than that it cannot be read."""
    return error.errno in _MISSING


def is_taken(path: Path) -> bool:
    """Whether something has this name; ``os.path.lexists`` would call a failed look a free name.

    Raises:
        OSError: It cannot be said.
    """
    try:
        retry(path.lstat)
    except OSError as error:
        if is_missing(error):
            return False
        raise
    return True


def unreadable(path: Path, error: OSError, otherwise: str) -> DataError:
    """Say that a file is there and cannot be read.

    Args:
        path: The file.
        error: The last attempt.
        otherwise: What else the user can do, as the end of a sentence.
    """
    is_forbidden = error.errno in _FINAL
    remedy = "give this user the right to" if is_forbidden else "try again when its disk answers"
    return DataError(f"{path} cannot be read: {error.strerror or error}; {remedy}, or {otherwise}.")
