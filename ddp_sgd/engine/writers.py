"""Asynchronous checkpoint writers: a thread, or a process for small states."""

import fcntl
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any, Protocol

import torch

from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.packing import pack, write_checkpoint
from ddp_sgd.checkpointing.snapshot import Snapshot
from ddp_sgd.checkpointing.writer_process import Destination, Packed, Written
from ddp_sgd.companion import start_companion
from ddp_sgd.engine.train_state import Tree

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
        self._reserved.exception()  # what could not be reserved is tried again
        try:
            copy = self._snapshot.take(tensors)
        except Exception as error:  # too little memory, most likely: ``wait`` reports it
            self._writing = Future()
            self._writing.set_exception(error)
        else:
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
        return Written(manifest.file, manifest.size_bytes, time.perf_counter())


class ProcessWriter:
    """Packs the state, and has a process write it: for small states of short steps.

    A thread that writes 0.1 MB holds the interpreter for 3 ms, as long as 25 such steps take.
    The process is started by the first checkpoint, and by the next one after it was killed.
    A second one may be begun meanwhile, since for some time one may take longer than an epoch; no
    third, so that a process that is killed does not end the run, and a stop need not wait long.

    Args:
        folder: Where to.
        device: Where the state is.
        keep: Newest checkpoints that stay.
        before: Is called before each write; where there is a checkpoint, this was done.
    """

    at_once = 2

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
        self._pid = os.getpid()
        self._process: _Process | None = None
        self._begun: deque[_Process | Exception] = deque()

    def begin(self, header: Header, tensors: Tree) -> None:
        """Pack the state, and send it."""
        try:
            self._before()
            copy = self._snapshot.take(tensors)  # what is part of a larger tensor is no more
            self._snapshot.wait()
            packed = Packed(header, pack(header, copy))
            if self._process is None or self._process.is_gone:
                self._process = _Process(self._destination)
            self._process.send(packed)
            self._begun.append(self._process)
        except Exception as error:  # whatever it is, ``wait`` tells
            self._begun.append(error)

    def is_over(self) -> bool:
        """Whether there is an answer, or will be none."""
        earliest = self._begun[0]
        return isinstance(earliest, Exception) or earliest.has_answered()

    def wait(self) -> Written:
        """Wait for the answer."""
        earliest = self._begun.popleft()
        answer = earliest if isinstance(earliest, Exception) else earliest.answer()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process when it has answered; a process that was forked has no part in it."""
        if self._process and os.getpid() == self._pid:
            while self._begun:
                with suppress(Exception):  # nobody asks any more
                    self.wait()
            self._process.end()


class _Process:
    """The process that writes, and the pipes to and from it.

    Args:
        destination: What it is told first.

    Raises:
        OSError: The system has no process left for us.
    """

    def __init__(self, destination: Destination) -> None:
        hears, self._messages = Pipe(duplex=False)
        self._answers, says = Pipe(duplex=False)
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with suppress(OSError):  # else, as on macOS, a message may wait until it is read
                fcntl.fcntl(self._messages.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        with hears, says:
            self.process = start_companion(
                "ddp_sgd.checkpointing.writer_process", hears=hears.fileno(), says=says.fileno()
            )
        # A forked loader process would hold the pipe open for as long as it outlives a killed rank.
        os.register_at_fork(after_in_child=self._messages.close)
        self.is_gone = False
        self.send(destination)

    def send(self, message: Destination | Packed | None) -> None:
        """Send a message; if that fails, the process is of no use any more."""
        try:
            self._messages.send(message)
        except BaseException:  # half of a message may have been sent
            self._kill()
            raise

    def has_answered(self) -> bool:
        """Whether there is an answer, or will be none."""
        return self.is_gone or self._answers.poll()

    def answer(self) -> Written | Exception:
        """Wait for an answer."""
        try:
            answer: Written | Exception = self._answers.recv()
        except (EOFError, OSError):
            self._kill()
            return OSError(f"the process that writes it ended with code {self.process.returncode}")
        return answer

    def end(self) -> None:
        """End the process once it has done all that it was told."""
        if not self.is_gone:
            with suppress(OSError):
                self.send(None)
            self.process.wait()
        self._messages.close()
        self._answers.close()

    def _kill(self) -> None:
        self.is_gone = True
        self.process.kill()
        self.process.wait()
        self._messages.close()


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
