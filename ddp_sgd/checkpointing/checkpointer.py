"""Checkpointer: the state is copied between steps, and a thread writes the copy to the disk."""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import torch

from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.packing import write_checkpoint
from ddp_sgd.checkpointing.snapshot import Snapshot
from ddp_sgd.errors import OutputError
from ddp_sgd.out_of_memory import Use, describe_out_of_memory

State_contra = TypeVar("State_contra", contravariant=True)
Tree = Mapping[str, Any]
Row = Mapping[str, Any]

_PATIENCE = 3
"""Saves in a row that may fail before the run ends."""

_SLOWEST_DISK = 1e8
"""Bytes per second that a disk writes at least, before anything is measured."""


class Checkpointer(Protocol[State_contra]):
    """Saves the state of a run; on rank 0 to the disk, elsewhere nowhere.

    Attributes:
        save_s: How long the last save took from its beginning to its end, in seconds; before the
            first, an estimate.
    """

    save_s: float

    def save(self, state: State_contra, wrapper_state: Tree) -> None:
        """Save the state as it is now; training may go on when this returns.

        Args:
            state: Where the run stands.
            wrapper_state: State of the data-parallel wrapper besides weights.
        """

    def poll(self) -> None:
        """Report a save that has ended since."""

    def finish(self) -> None:
        """Wait for the last save."""


class NoCheckpointer:
    """Saves nothing: what every rank but 0 holds."""

    save_s = 0.0

    def save(self, state: object, wrapper_state: Tree) -> None:
        """Do nothing."""

    def poll(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class _Save(NamedTuple):
    """A save that is going on.

    Args:
        header: Where the run stood.
        start: When it began, on the clock of ``time.perf_counter``.
        stall_s: How long training stood still for it.
        written: Name and length of the file, and when it was written.
    """

    header: Header
    start: float
    stall_s: float
    written: "Future[tuple[str, int, float]]"


class AsyncCheckpointer(Generic[State_contra]):
    """Writes in a thread, one checkpoint at a time.

    A save that fails is reported at once, and the run goes on with the checkpoints that it has;
    three in a row end it.

    Args:
        folder: Where to.
        state_dict: Gives the header and the tensors of a state.
        tensors: Tensors like those to come, to reserve memory for.
        device: Where they are.
        keep: Newest checkpoints that stay.
        before: Is called before each write; where there is a checkpoint, this was done.
        report: Takes the header of a save, and a row about how it ended.

    Attributes:
        save_s: See ``Checkpointer``.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        state_dict: Callable[[State_contra], tuple[Header, Tree]],
        tensors: Tree,
        *,
        device: torch.device,
        keep: int,
        before: Callable[[], None],
        report: Callable[[Header, Row], None],
    ) -> None:
        self._folder = folder
        self._state_dict = state_dict
        self._keep = keep
        self._before = before
        self._report = report
        self._going: _Save | None = None
        self._failures = 0
        self._failure: Exception | None = None
        self.save_s = 1.0 + bytes_of(tensors) / _SLOWEST_DISK
        self._snapshot = Snapshot(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ddp_sgd-checkpoint")
        self._reserved = self._thread.submit(self._snapshot.reserve, tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for a save that is going on: half of it is of no use to anyone."""
        self._thread.shutdown(wait=True)

    def save(self, state: State_contra, wrapper_state: Tree) -> None:
        """Copy the state as it is now, and write the copy in the background.

        Args:
            state: Where the run stands.
            wrapper_state: Of the data-parallel wrapper, besides weights; saved as ``compression``.

        Raises:
            OutputError: This many saves in a row have failed.
        """
        start = time.perf_counter()
        self._settle()
        header, tensors = self._state_dict(state)
        if wrapper_state:
            tensors = {**tensors, "compression": wrapper_state}
        self._reserved.exception()  # what could not be reserved is tried again
        written: Future[tuple[str, int, float]]
        try:
            copy = self._snapshot.take(tensors)
        except Exception as error:  # too little memory, most likely: a failed save
            written = Future()
            written.set_exception(error)
        else:
            written = self._thread.submit(self._write, header, copy)
        self._going = _Save(header, start, time.perf_counter() - start, written)

    def poll(self) -> None:
        """Report a save that has ended since.

        Raises:
            OutputError: This many saves in a row have failed.
        """
        if self._going and self._going.written.done():
            self._settle()

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            OutputError: It failed.
        """
        self._settle()
        if self._failure is not None:
            raise self._unsaved()

    def _write(self, header: Header, tensors: Tree) -> tuple[str, int, float]:
        self._before()
        self._snapshot.wait()
        manifest = write_checkpoint(self._folder, header, tensors, keep=self._keep)
        return manifest.file, manifest.size_bytes, time.perf_counter()

    def _settle(self) -> None:
        """Wait for the save that is going on, if any, and report it."""
        save, self._going = self._going, None
        if save is None:
            return
        try:
            file, num_bytes, end = save.written.result()
        except Exception as error:  # whatever it is, the run has its earlier checkpoints
            self._failures += 1
            self._failure = error
            self._report(save.header, {"error": f"not written: {_reason(error)}"})
            if self._failures >= _PATIENCE:
                raise self._unsaved() from error
            return
        self._failures, self._failure = 0, None
        self.save_s = end - save.start
        row = {"file": file, "bytes": num_bytes, "save_s": self.save_s, "stall_s": save.stall_s}
        self._report(save.header, row)

    def _unsaved(self) -> OutputError:
        times = f", {self._failures} times in a row" if self._failures > 1 else ""
        remedy = "make room on its disk, or set output_dir to another, and start again"
        text = _out_of_memory(self._failure) or f"{_reason(self._failure)}; {remedy}"
        return OutputError(f"{self._folder.path} does not take a checkpoint{times}: {text}.")


def bytes_of(tree: Any) -> int:
    """Count the bytes of all tensors in nested mappings."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    return sum(map(bytes_of, tree.values())) if isinstance(tree, Mapping) else 0


def _out_of_memory(error: Exception | None) -> str | None:
    return describe_out_of_memory(error, Use.SNAPSHOT) if error else None


def _reason(error: Exception | None) -> str:
    if text := _out_of_memory(error):
        return text
    strerror = getattr(error, "strerror", None)
    return strerror or (str(error).strip() or type(error).__name__).splitlines()[0]
