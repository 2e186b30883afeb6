"""Writing a checkpoint so that a reader finds all of it or nothing, whatever dies meanwhile."""

import errno
import hashlib
import io
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ddp_sgd.checkpointing.folder import UNFINISHED, CheckpointFolder, fault_of
from ddp_sgd.checkpointing.manifest import FORMAT, Header, Manifest

_GATHER_BYTES = 1 << 18
_ENVELOPE_BYTES = 1 << 16
_ENVELOPE_BYTES_PER_TENSOR = 1 << 10


def write_checkpoint(
    folder: CheckpointFolder, header: Header, tensors: Mapping[str, Any], *, keep: int
) -> Manifest:
    """Write, read back, and only then let older checkpoints go.

    The order is what makes it safe: room is reserved; the file is written beside its place, synced
    and read back from the disk; then comes the manifest, and last the file takes its place. Both
    names reach the disk together: should only one be there after a power cut, a file without a
    manifest is passed over, and a manifest without a file is no checkpoint.

    Args:
        folder: Where to.
        header: Where the run stands.
        tensors: What else the file holds: mappings of tensors on the host, and plain data.
        keep: Newest checkpoints that stay.

    Raises:
        OSError: It could not be written, or came back changed; what was there before is untouched.
    """
    folder.path.mkdir(exist_ok=True)
    file = folder.path / folder.name_for(header)
    new = file.with_name(f".{file.name}{UNFINISHED}")
    try:
        size, digest = _write_tensors(new, header, tensors)
        manifest = Manifest(
            file=file.name, size_bytes=size, sha256=digest, time=time.time(), header=header
        )
        _forget_cached(new)
        _refuse_change(new, manifest)
        _replace(file.with_suffix(".json"), manifest.to_text().encode())
        new.replace(file)
        _sync_folder(folder.path)
    except BaseException:
        folder.clean_up()
        raise
    folder.settle(keep=keep, written=manifest)
    return manifest


def _refuse_change(new: Path, manifest: Manifest) -> None:
    if fault := fault_of(new, manifest):
        raise OSError(errno.EIO, f"what was written {fault}")


def _write_tensors(new: Path, header: Header, tensors: Mapping[str, Any]) -> tuple[int, str]:
    """Write a file that ``torch.load(weights_only=True)`` reads; gives its size and SHA-256."""
    content = {"format": FORMAT, **_plain(header), **tensors}
    with new.open("wb", buffering=0) as raw:
        _reserve(raw.fileno(), _room_for(tensors))
        stream = _Hashed(raw)
        gathered = io.BufferedWriter(stream, _GATHER_BYTES)  # torch writes a hundred small pieces
        try:
            torch.save(content, gathered)
            gathered.flush()
        except RuntimeError as error:  # torch hides what the system said
            raise stream.failure or error from error
        raw.truncate(stream.size)
        os.fsync(raw.fileno())
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


def _plain(header: Header) -> dict[str, Any]:
    """Group a header the way a reader looks for it."""
    cursor = ("epoch", "position", "step", "samples")
    names = [name for name in header.__slots__ if name not in cursor]
    return {
        "cursor": {name: getattr(header, name) for name in cursor},
        **{name: getattr(header, name) for name in names},
    }


def _room_for(tree: Any) -> int:
    """Bytes that a file needs at most, so that a full disk shows before the first is written."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes + _ENVELOPE_BYTES_PER_TENSOR
    if isinstance(tree, Mapping):
        return sum(_room_for(value) for value in tree.values()) + _ENVELOPE_BYTES
    return 0


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        # A file system that cannot reserve room fails in the write itself, if it must.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}{UNFINISHED}")
    with new.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(path)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _forget_cached(file: Path) -> None:
    """Have the next reader ask the disk, not the memory of the system."""
    if hasattr(os, "posix_fadvise"):
        with file.open("rb") as stream, suppress(OSError):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
