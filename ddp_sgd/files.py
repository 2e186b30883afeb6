"""Files: atomic and synced writes of small ones, and reads that are tried again. No torch.

A file that cannot be read is not a file that is damaged: a network file system fails for a moment,
and a later attempt may find it whole. So it is read again, and if that does not help, the caller
gets the error.
"""

import errno
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import sleep
from typing import TypeVar

from ddp_sgd.errors import DataError

_NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""Errors of a file system that cannot sync a folder."""


def replace_file(path: Path, text: str) -> None:
    """Replace a file whole and sync it, so that a reader never finds half of it.

    Args:
        path: The file; nothing is left beside it if this fails.
        text: The new content.

    Raises:
        OSError: It cannot be written.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text)
        sync_file(new)  # before the rename, or a power cut may leave an empty file of that name
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder, unless it exists, and sync the entry in its parent.

    Raises:
        OSError: It cannot be made, or its name is that of a file.
    """
    if not path.is_dir():
        path.mkdir(exist_ok=True)
        sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Return when the content of a file is on the disk.

    Raises:
        OSError: It cannot be read, or did not reach the disk.
    """
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Return when the names in a folder are on the disk, where the file system can sync them.

    Raises:
        OSError: It cannot be read, or did not reach the disk.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


T = TypeVar("T")

PAUSES_S = (0.1, 0.3, 1.0)
"""Pauses between attempts. A stale handle is gone when the name is looked up again; a server that
fails over may take longer than a start should wait.
"""

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
"""Errors of a name without a file: these are final."""

_FINAL = (*_MISSING, errno.EACCES, errno.EPERM)
"""Errors that a retry does not change."""


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
    """Whether an error means that there is no such file, rather than that it cannot be read."""
    return error.errno in _MISSING


def is_file(path: Path) -> bool:
    """Whether this is a file; on any error ``Path.is_file`` returns False from Python 3.14 on.

    Raises:
        OSError: The path cannot be checked.
    """
    try:
        return stat.S_ISREG(retry(path.stat).st_mode)
    except OSError as error:
        if is_missing(error):
            return False
        raise


def is_taken(path: Path) -> bool:
    """Whether something has this name; ``os.path.lexists`` would call a failed look a free name.

    Raises:
        OSError: The path cannot be checked.
    """
    try:
        retry(path.lstat)
    except OSError as error:
        if is_missing(error):
            return False
        raise
    return True


def unreadable(path: Path, error: OSError, otherwise: str) -> DataError:
    """Return the error of a file that is there and cannot be read.

    Args:
        path: The file.
        error: The last attempt.
        otherwise: What else the user can do, as the end of a sentence.
    """
    is_forbidden = error.errno in _FINAL
    remedy = "give this user the right to" if is_forbidden else "try again when its disk answers"
    return DataError(f"{path} cannot be read: {error.strerror or error}; {remedy}, or {otherwise}.")
