"""Atomic writes of checkpoints: a reader finds the whole file or none, even after a crash.

Files have the form that ``torch.load(weights_only=True)`` reads.
"""

import errno
import hashlib
import io
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from ddp_sgd.checkpointing.manifest import FORMAT, Header, Manifest
from ddp_sgd.checkpointing.store import UNFINISHED, CheckpointFolder, fault_of
from ddp_sgd.files import make_folder, sync_folder

_GATHER_BYTES = 1 << 18
_ENVELOPE_BYTES = 1 << 16
_ENVELOPE_BYTES_PER_TENSOR = 1 << 10


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
        manifest_file = file.with_suffix(".json")
        new_manifest_file = manifest_file.with_name(f".{manifest_file.name}{UNFINISHED}")
        new_manifest_file.write_bytes(manifest.to_text().encode())
        _sync(new, new_manifest_file)
        _forget_cached(new)
        _refuse_change(new, manifest)
        new_manifest_file.replace(manifest_file)
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
        except RuntimeError as error:  # torch hides the error of the system
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
    """Drop a file from the page cache: the next reader gets what is on the disk."""
    with file.open("rb") as stream:
        _let_go(stream.fileno())


def _let_go(descriptor: int) -> None:
    """Have the system write out what is not on the disk, without a wait, and forget what is."""
    if sys.platform != "darwin" and hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def write_checkpoint(
    folder: CheckpointFolder, header: Header, tensors: Mapping[str, Any], *, keep: int
) -> Manifest:
    """Write a checkpoint as ``write_content`` does, piece by piece.

    Args:
        folder: Where to.
        header: Where the run stands.
        tensors: What else the file holds: mappings of tensors on the host, and plain data.
        keep: Newest checkpoints that stay.

    Raises:
        OSError: It could not be written, or came back changed; what was there before is untouched.
    """

    def fill(stream: io.RawIOBase) -> None:
        gathered = io.BufferedWriter(stream, _GATHER_BYTES)  # torch writes a hundred small pieces
        _save(header, tensors, gathered)
        gathered.flush()

    return write_content(folder, header, Content(_room_for(tensors), fill), keep=keep)


def _save(header: Header, tensors: Mapping[str, Any], stream: BinaryIO) -> None:
    torch.save({"format": FORMAT, **_plain(header), **tensors}, stream)


def _plain(header: Header) -> dict[str, Any]:
    """Group a header the way a reader looks for it."""
    cursor = ("epoch", "position", "step", "samples")
    names = [name for name in header.__slots__ if name not in cursor]
    return {
        "cursor": {name: getattr(header, name) for name in cursor},
        **{name: getattr(header, name) for name in names},
        "skipped": tuple(header.skipped),  # weights_only takes no class of ours
    }


def _room_for(tree: Any) -> int:
    """Bytes that a file needs at most, so that a full disk shows before the first is written."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes + _ENVELOPE_BYTES_PER_TENSOR
    if isinstance(tree, Mapping):
        return sum(_room_for(value) for value in tree.values()) + _ENVELOPE_BYTES
    return 0
