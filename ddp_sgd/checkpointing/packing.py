"""Serialization of a checkpoint, in the form that ``torch.load(weights_only=True)`` reads."""

import io
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch

from ddp_sgd.checkpointing.atomic_write import Content, write_content
from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.checkpointing.manifest import FORMAT, Header, Manifest

_GATHER_BYTES = 1 << 18
_ENVELOPE_BYTES = 1 << 16
_ENVELOPE_BYTES_PER_TENSOR = 1 << 10


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
    }


def _room_for(tree: Any) -> int:
    """Bytes that a file needs at most, so that a full disk shows before the first is written."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes + _ENVELOPE_BYTES_PER_TENSOR
    if isinstance(tree, Mapping):
        return sum(_room_for(value) for value in tree.values()) + _ENVELOPE_BYTES
    return 0
