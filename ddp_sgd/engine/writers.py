"""The two ways of a checkpoint to the disk while training goes on: by a thread, or by a process."""

import fcntl
import pickle
import select
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

import torch

from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.packing import pack, write_checkpoint
from ddp_sgd.checkpointing.snapshot import Snapshot
from ddp_sgd.checkpointing.writer_process import Destination, Packed, Written
from ddp_sgd.companion import start_companion, to_companion
from ddp_sgd.engine.capture import Tree

SMALL_BYTES = 2**19
"""State that is packed sooner than a thread is woken for it, and fits into a pipe."""

_PIPE_BYTES = 2**20


class Writer(Protocol):
    """Writes checkpoints in order; what goes wrong comes up in ``wait``.

    Attributes:
        at_once: How many may be begun and not waited for.
    """

    at_once: int

    def begin(self, header: Header, tensors: Tree) -> None:
        """Take the state as it is now; it may change when this returns.

        Args:
            header: Where the run stands.
            tensors: The state, where it is.
        """

    def is_over(self) -> bool:
        """Whether the earliest checkpoint that is not waited for is written, or failed."""

    def wait(self) -> Written:
        """Wait for the earliest checkpoint that was begun.

        Raises:
            Exception: It was not written.
        """

    def close(self) -> None:
        """Wait for what is going on, and end."""


class ThreadWriter:
    """Copies the state, and writes the copy in a thread, piece by piece: for states of any size.

    Args:
        folder: Where to.
        device: Where the state is.
        keep: Newest checkpoints that stay.
        before: Is called before each write; where there is a checkpoint, this was done.
        tensors: State like those to come, to reserve memory for.
    """

    at_once = 1

    def __init__(
        self,
        folder: CheckpointFolder,
        device: torch.device,
        *,
        keep: int,
        before: Callable[[], None],
        tensors: Tree,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._before = before
        self._snapshot = Snapshot(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._reserved = self._thread.submit(self._snapshot.reserve, tensors)
        self._writing: Future[Written] | None = None

    def begin(self, header: Header, tensors: Tree) -> None:
        """Copy the state."""
        self._reserved.result()
        copy = self._snapshot.take(tensors)
        self._writing = self._thread.submit(self._write, header, copy)

    def is_over(self) -> bool:
        """Whether the thread is done."""
        return self._writing is None or self._writing.done()

    def wait(self) -> Written:
        """Wait for the thread."""
        if self._writing is None:
            raise RuntimeError("nothing was begun")
        return self._writing.result()

    def close(self) -> None:
        """End the thread: half a checkpoint is of no use to anyone."""
        self._thread.shutdown(wait=True)

    def _write(self, header: Header, tensors: Tree) -> Written:
        self._before()
        self._snapshot.wait()
        manifest = write_checkpoint(self._folder, header, tensors, keep=self._keep)
        return Written(manifest, time.perf_counter())


class ProcessWriter:
    """Packs the state, and has a process write it: for small states of short steps.

    A thread that writes 0.1 MB holds the interpreter for 3 ms, as long as 25 such steps take.
    The process is started by the first checkpoint, and by the next one after it was killed.
    Several may be on their way, since for some time one may take longer than an epoch.

    Args:
        folder: Where to.
        device: Where the state is.
        keep: Newest checkpoints that stay.
        before: Is called before each write; where there is a checkpoint, this was done.
    """

    at_once = 8

    def __init__(
        self,
        folder: CheckpointFolder,
        device: torch.device,
        *,
        keep: int,
        before: Callable[[], None],
    ) -> None:
        self._destination = Destination(folder.path.absolute(), keep)
        self._before = before
        self._snapshot = Snapshot(device)
        self._process: subprocess.Popen[bytes] | None = None
        self._begun: deque[Exception | None] = deque()

    def begin(self, header: Header, tensors: Tree) -> None:
        """Pack the state, and send it."""
        failure = None
        try:
            self._before()
            copy = self._snapshot.take(tensors)  # what is part of a larger tensor is no more
            self._snapshot.wait()
            packed = Packed(header, pack(header, copy))
            self._send(self._process or self._start(), packed)
        except Exception as error:  # whatever it is, ``wait`` tells
            failure = error
        self._begun.append(failure)

    def is_over(self) -> bool:
        """Whether there is an answer."""
        if self._begun[0] or self._process is None or self._process.stdout is None:
            return True
        return bool(select.select([self._process.stdout], [], [], 0)[0])

    def wait(self) -> Written:
        """Wait for the answer."""
        answer = self._begun.popleft() or self._read_answer()
        if isinstance(answer, Written):
            return answer
        if self._process and None not in self._begun:
            self._process.kill()  # the next one begins with a process that can be relied on
            self._end()
        raise answer

    def close(self) -> None:
        """End the process when it has answered."""
        while self._begun:
            with suppress(Exception):  # nobody asks any more
                self.wait()
        if self._process:
            with suppress(OSError):
                self._send(self._process, None)
        self._end()

    def _read_answer(self) -> Written | Exception:
        if self._process is None or self._process.stdout is None:
            return RuntimeError("nothing was begun")
        try:
            answer: Written | Exception = pickle.load(self._process.stdout)
        except EOFError:
            gone = OSError(f"the process that writes it ended with code {self._end()}")
            self._begun = deque(failure or gone for failure in self._begun)
            return gone
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        self._process = start_companion("ddp_sgd.checkpointing.writer_process")
        to = to_companion(self._process)
        with suppress(OSError, AttributeError):  # else a write may wait until it is read
            fcntl.fcntl(to.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self._send(self._process, self._destination)
        return self._process

    @staticmethod
    def _send(process: subprocess.Popen[bytes], message: Destination | Packed | None) -> None:
        to_companion(process).write(pickle.dumps(message))
        to_companion(process).flush()

    def _end(self) -> int | None:
        """Wait for the end of the process, if there is one, and return its code."""
        process, self._process = self._process, None
        if process is None:
            return None
        code = process.wait()
        with suppress(OSError):  # what was not sent yet has no reader
            to_companion(process).close()
        if process.stdout:
            process.stdout.close()
        return code


def build_writer(
    tensors: Tree,
    *,
    folder: CheckpointFolder,
    device: torch.device,
    keep: int,
    before: Callable[[], None],
) -> Writer:
    """Choose by the size of the state, and by where it is: to read an accelerator is to wait.

    Args:
        tensors: State like those to come.
        folder: Where to.
        device: Where the state is.
        keep: Newest checkpoints that stay.
        before: Is called before each write; where there is a checkpoint, this was done.
    """
    if device.type == "cpu" and bytes_of(tensors) <= SMALL_BYTES:
        return ProcessWriter(folder, device, keep=keep, before=before)
    return ThreadWriter(folder, device, keep=keep, before=before, tensors=tensors)


def bytes_of(tree: Any) -> int:
    """Count the bytes of all tensors in nested mappings."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    return sum(map(bytes_of, tree.values())) if isinstance(tree, Mapping) else 0
