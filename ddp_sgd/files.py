"""Atomic and synced writes of small files. No torch."""

import errno
import os
from contextlib import suppress
from pathlib import Path

_NO_SYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system answers that cannot sync a folder."""


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
    """Return when the names in a folder are on the disk, where the file system can tell.

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
