"""Serialization of checkpoints: atomic writes, and reads that run nothing of what a file contains.

A reader finds the whole file or none, even after a crash; it has the form that
``torch.load(weights_only=True)`` reads. State that could be written but not read back is refused.
"""

import errno
import hashlib
import io
import os
import pickle
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from ddp_sgd.checkpointing.store import (
    FORMAT,
    UNFINISHED,
    CheckpointFolder,
    Header,
    Manifest,
    fault_of,
    manifest_of,
)
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.files import is_missing, make_folder, retry, sync_folder, unreadable
from ddp_sgd.text import first_line

_PLAIN = (torch.Tensor, nn.Parameter, int, float, bool, str, bytes, complex, type(None))
"""Classes that a reader accepts; one derived from them may run code of its own."""

_ANOTHER = "name another checkpoint"


def read_tensors(file: Path) -> dict[str, Any]:
    """Load a checkpoint onto the host.

    Returns:
        ``model`` (name to tensor), ``optimizer`` (``momentum_buffer``: name to tensor), the header
        by name, ``data``, marks of the training data, if they could be read, and ``compression`` if
        the run's gradients left something to remember.

    Raises:
        DataError: It cannot be read, is no checkpoint, or holds more than tensors and plain data.
    """
    try:
        content = retry(lambda: _load(file))
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{file} holds more than tensors and plain data, and is not read; name a file that "
            "`python -m ddp_sgd.checkpoint verify` accepts."
        ) from error
    except Exception as error:  # of a damaged pickle comes any
        if isinstance(error, OSError) and not is_missing(error):
            raise unreadable(file, error, _ANOTHER) from error
        cause = first_line(error)
        raise DataError(
            f"{file} is no checkpoint that can be read: {cause}; name a file that "
            "`python -m ddp_sgd.checkpoint verify` accepts."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DataError(
            f"{file} is no checkpoint of format {FORMAT}; name a file that ddp_sgd has written."
        )
    return content


def find_checkpoint(path: Path) -> tuple[Path, Manifest]:
    """Find the checkpoint that a user names, and verify it.

    Args:
        path: A checkpoint, a link to one, a run folder or its checkpoints folder; of a folder it is
            the newest that is whole.

    Raises:
        DataError: There is none, or it is damaged.
    """
    try:
        return _find(path)
    except OSError as error:
        raise unreadable(path, error, _ANOTHER) from error


def _load(file: Path) -> Any:
    # weights_only is passed: an environment variable may turn torch's default off.
    return torch.load(file, map_location="cpu", weights_only=True)


def _find(path: Path) -> tuple[Path, Manifest]:
    if path.is_dir():
        folder = CheckpointFolder.at(path)
        chosen = folder.choose()
        if chosen.manifest is None:
            why = "; ".join(chosen.passed_over) or "nothing was saved in it"
            raise DataError(f"{path} holds no checkpoint that is whole ({why}); name another.")
        return folder.path / chosen.manifest.file, chosen.manifest
    file = Path(os.path.realpath(path))  # resolve() raises RuntimeError where links run in a circle
    if not file.is_file():
        raise DataError(f"{path} is not there; name a checkpoint or a run folder.")
    manifest = manifest_of(file)
    if manifest is None:
        raise DataError(
            f"{path} has no valid manifest {file.with_suffix('.json').name} beside it; "
            "name a checkpoint that was written whole."
        )
    if fault := fault_of(file, manifest):
        raise DataError(f"{path} {fault}; name another checkpoint.")
    return file, manifest


def refuse_foreign(tree: Any, path: str = "model") -> None:
    """Refuse state that could be written but not read back: reading runs no code.

    Args:
        tree: Tensors and plain data, nested.
        path: Where the tree is, for the error.

    Raises:
        ConfigError: It holds something else.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            refuse_foreign(key, f"{path}.{key}")
            refuse_foreign(value, f"{path}.{key}")
    elif type(tree) in (list, tuple, torch.Size):
        for number, value in enumerate(tree):
            refuse_foreign(value, f"{path}.{number}")
    elif type(tree) not in _PLAIN:
        raise ConfigError(
            f"the state {path} is a {type(tree).__name__}, which a checkpoint cannot hold; keep "
            "tensors and plain numbers, text, lists and mappings in the state of the model."
        )
    elif isinstance(tree, torch.Tensor) and tree.layout is not torch.strided:
        layout = str(tree.layout).removeprefix("torch.")
        raise ConfigError(
            f"the state {path} has the layout {layout}, which a checkpoint cannot hold; pass "
            "persistent=False to register_buffer, or make it dense with .to_dense()."
        )


_GATHER_BYTES = 1 << 18
_ENVELOPE_BYTES = 1 << 16
_ENVELOPE_BYTES_PER_TENSOR = 1 << 10


def write_checkpoint(
    folder: CheckpointFolder, header: Header, tensors: Mapping[str, Any], *, keep: int
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
        tensors: What else the file holds: mappings of tensors on the host, and plain data.
        keep: Newest checkpoints that stay.

    Raises:
        OSError: It could not be written, or came back changed; what was there before is untouched.
    """
    make_folder(folder.path)
    file = folder.path / folder.name_for(header)
    new = file.with_name(f".{file.name}{UNFINISHED}")
    try:
        size, digest = _write_new(new, header, tensors)
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


def _write_new(new: Path, header: Header, tensors: Mapping[str, Any]) -> tuple[int, str]:
    """Write a file; gives its size and SHA-256."""
    with new.open("wb", buffering=0) as raw:
        _reserve(raw.fileno(), _room_for(tensors))
        stream = _Hashed(raw)
        gathered = io.BufferedWriter(stream, _GATHER_BYTES)  # torch writes a hundred small pieces
        try:
            _save(header, tensors, gathered)
            gathered.flush()
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
