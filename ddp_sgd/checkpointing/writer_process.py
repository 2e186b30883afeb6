"""The process that writes small checkpoints, off the interpreter of the rank. No torch.

Rank 0 sends messages through stdin: a ``Destination``, then one ``Packed`` after the other,
at the end None. Each checkpoint is answered through stdout by a ``Written``, or by what went wrong.
If the rank is killed, this process ends at once, as a thread of the rank would.
"""

import io
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from ddp_sgd.checkpointing.atomic_write import Content, write_content
from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.companion import serve_the_rank
from ddp_sgd.distributed.cpus import leave_batch_scheduling


class Destination(NamedTuple):
    """What the process is told first.

    Args:
        path: Folder of the checkpoints.
        keep: Newest that stay.
    """

    path: Path
    keep: int


class Packed(NamedTuple):
    """A checkpoint to be written.

    Args:
        header: Where the run stood.
        data: Bytes of the file.
    """

    header: Header
    data: bytes


class Written(NamedTuple):
    """A checkpoint that was written.

    Args:
        file: Name of the file.
        num_bytes: Its length.
        end: When that was, on the clock of ``time.perf_counter``, which all processes share.
    """

    file: str
    num_bytes: int
    end: float


def main() -> None:
    """Serve rank 0 until it says that the run is over, or is gone."""
    leave_batch_scheduling()  # or each wait for the disk would cost a turn of W&B on the same CPU
    said, told = serve_the_rank()
    messages, answers = Connection(said, writable=False), Connection(told, readable=False)
    with suppress(EOFError, OSError):  # the rank is gone, between two messages or within one
        destination: Destination = messages.recv()
        folder = CheckpointFolder(destination.path)
        while packed := messages.recv():
            answers.send(_write(folder, packed, destination.keep))


def _write(folder: CheckpointFolder, packed: Packed, keep: int) -> Written | Exception:
    def fill(stream: io.RawIOBase) -> None:
        stream.write(packed.data)

    try:
        content = Content(len(packed.data), fill)
        manifest = write_content(folder, packed.header, content, keep=keep)
    except OSError as error:
        return error
    except Exception as error:  # whatever it is, it has to travel
        return RuntimeError(f"{type(error).__name__}: {error}")
    return Written(manifest.file, manifest.size_bytes, time.perf_counter())
