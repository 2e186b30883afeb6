"""Atomic writes: a reader finds the whole file or none, even after a crash. No torch."""

import errno
import hashlib
import io
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ddp_sgd.checkpointing.manifest import Header, Manifest
from ddp_sgd.checkpointing.store import UNFINISHED, CheckpointFolder, fault_of
from ddp_sgd.files import make_folder, sync_folder


class Content(NamedTuple):
    """What is to be written.

    Args:
        most_bytes: Its length at most.
        fill: Writes it.
    """

    most_bytes: int
    fill: Callable[[io.RawIOBase], Any]


def write_content(
    folder: CheckpointFolder, header: Header, content: Content, *, keep: int
) -> Manifest:
    """Write, read back, and only then let older checkpoints go.

    The order is what makes it safe: room is reserved; the file and its manifest are written beside
    their places and synced; the file is read back from the disk; then comes the manifest, and last
    the file takes its place. Both names reach the disk together: should only one be there after a
    power cut, a file without a manifest is passed over, and a manifest without a file is no
    checkpoint.

    Args:
        folder: Where to.
        header: Where the run stands.
        content: What the file holds.
        keep: Newest checkpoints that stay.

    Raises:
        OSError: It could not be written, or came back changed; what was there before is untouched.
    """
    make_folder(folder.path)
    file = folder.path / folder.name_for(header)
    new = file.with_name(f".{file.name}{UNFINISHED}")
    try:
        size, digest = _write_new(new, content)
        manifest = Manifest(
            file=file.name, size_bytes=size, sha256=digest, time=time.time(), header=header
        )
        told = file.with_suffix(".json")
        new_told = told.with_name(f".{told.name}{UNFINISHED}")
        new_told.write_bytes(manifest.to_text().encode())
        _sync(new, new_told)
        _forget_cached(new)
        _refuse_change(new, manifest)
        new_told.replace(told)
        new.replace(file)
        sync_folder(folder.path)
    except BaseException:
        folder.clean_up()
        raise
    folder.settle(keep=keep, written=manifest)
    return manifest


def _refuse_change(new: Path, manifest: Manifest) -> None:
    if fault := fault_of(new, manifest):
        raise OSError(errno.EIO, f"what was written {fault}")


def _write_new(new: Path, content: Content) -> tuple[int, str]:
    """Write a file; gives its size and SHA-256."""
    with new.open("wb", buffering=0) as raw:
        _reserve(raw.fileno(), content.most_bytes)
        stream = _Hashed(raw)
        try:
            content.fill(stream)
        except RuntimeError as error:  # torch hides what the system said
            raise stream.failure or error from error
        raw.truncate(stream.size)
    return stream.size, stream.digest.hexdigest()


class _Hashed(io.RawIOBase):
    """A file that hashes what goes through, and remembers why a write failed."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self.size = 0
        self.digest = hashlib.sha256()
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        rest = memoryview(data).cast("B")
        length = len(rest)
        self.digest.update(rest)
        try:
            while rest:
                rest = rest[self._raw.write(rest) :]
        except OSError as error:
            self.failure = error
            raise
        self.size += length
        return length


def _reserve(descriptor: int, size: int) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS: the write itself fails, if it must
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        # A file system that cannot reserve room fails in the write itself, if it must.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _sync(*files: Path) -> None:
    """Bring files to the disk. All set out before the first is waited for: that is one wait."""
    with ExitStack() as stack:
        streams = [stack.enter_context(file.open("rb")) for file in files]
        for stream in streams:
            _let_go(stream.fileno())
        for stream in streams:
            os.fsync(stream.fileno())


def _forget_cached(file: Path) -> None:
    """Have the next reader ask the disk, not the memory of the system."""
    with file.open("rb") as stream:
        _let_go(stream.fileno())


def _let_go(descriptor: int) -> None:
    """Have the system write out what is not on the disk, without a wait, and forget what is."""
    if sys.platform != "darwin" and hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
