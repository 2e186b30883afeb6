"""Checkpointer: the state is copied between steps, and a thread writes the copy to the disk.

Snapshot of the state in host memory, page-locked where possible; training waits for the copy.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

import torch

from ddp_sgd.checkpointing.serialization import refuse_foreign, write_checkpoint
from ddp_sgd.checkpointing.store import FOLDER_NAME, CheckpointFolder, Header
from ddp_sgd.errors import OutputError, Use, describe_out_of_memory, unwritable
from ddp_sgd.files import make_folder
from ddp_sgd.text import first_line
from ddp_sgd.tree import map_leaves, tensors_in

_Key = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


class Snapshot:
    """Host memory as large as the state, page-locked where the state is on an accelerator.

    Where no page-locked memory is to be had, pageable memory takes its place.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pin = device.type in ("cuda", "xpu")
        self._kept: dict[_Key, torch.Tensor] = {}
        self._before: dict[_Key, torch.Tensor] = {}
        self._copied: torch.Event | None = None

    def reserve(self, tree: Mapping[str, Any]) -> None:
        """Get hold of the memory beforehand, since its first use takes longer than the copy."""
        for tensor in filter(_has_memory, tensors_in(tree)):
            if (key := _key(tensor)) not in self._kept:
                self._kept[key] = self._like(tensor).zero_()

    def take(self, tree: Mapping[str, Any]) -> Any:
        """Copy all tensors of a tree; the copy is whole after ``wait``.

        Tensors that are one and the same stay so. The copy is overwritten by the next one.

        Args:
            tree: Mappings and lists of tensors and plain data, nested.

        Returns:
            The same tree over the kept memory.
        """
        self._before, self._kept = self._kept, {}
        copy = map_leaves(self._copy, tree)
        self._before = {}
        if self._device.type != "cpu":
            self._copied = torch.Event(self._device)
            self._copied.record()
        return copy

    def wait(self) -> None:
        """Wait until an accelerator has filled the last copy."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if not _has_memory(leaf):
            return leaf.detach().cpu().clone()
        key = _key(leaf)
        if key not in self._kept:
            host = self._before.get(key)
            host = self._like(leaf) if host is None else host
            self._kept[key] = host.copy_(leaf.detach(), non_blocking=True)
        return self._kept[key]

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._pin:
            try:
                return torch.empty_like(tensor.detach(), device="cpu", pin_memory=True)
            except RuntimeError:  # the system lets no more memory be locked: copies take longer
                self._pin = False
        return torch.empty_like(tensor.detach(), device="cpu")


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one piece of memory, other than a sparse one."""
    return tensor.layout is torch.strided and not tensor.is_quantized


def _key(tensor: torch.Tensor) -> _Key:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


Tree = Mapping[str, Any]
Row = Mapping[str, Any]

_PATIENCE = 3
"""Saves in a row that may fail before the run ends."""

_SLOWEST_DISK = 1e8
"""Bytes per second that a disk writes at least, before anything is measured."""


class Checkpointer(Protocol):
    """Saves the state of a run; on rank 0 to the disk, elsewhere nowhere.

    Attributes:
        save_s: How long the last save took from its beginning to its end, in seconds; before the
            first, an estimate.
    """

    save_s: float

    def save(self, header: Header, tensors: Tree) -> None:
        """Save a state dict; training may go on when this returns."""

    def poll(self) -> None:
        """Report a save that has ended since."""

    def finish(self) -> None:
        """Wait for the last save."""


class NoCheckpointer:
    """Saves nothing: what every rank but 0 holds."""

    save_s = 0.0

    def save(self, header: Header, tensors: Tree) -> None:
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


class AsyncCheckpointer:
    """Writes in a thread, one checkpoint at a time.

    A save that fails is reported at once, and the run goes on with the checkpoints that it has;
    three in a row end it.

    Args:
        folder: Where to.
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
        tensors: Tree,
        *,
        device: torch.device,
        keep: int,
        before: Callable[[], None],
        report: Callable[[Header, Row], None],
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._before = before
        self._report = report
        self._going: _Save | None = None
        self._failures = 0
        self._failure: Exception | None = None
        self.save_s = 1.0 + sum(tensor.nbytes for tensor in tensors_in(tensors)) / _SLOWEST_DISK
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

    def save(self, header: Header, tensors: Tree) -> None:
        """Copy a state dict, and write the copy in the background.

        Raises:
            OutputError: This many saves in a row have failed.
        """
        start = time.perf_counter()
        self._settle()
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
        except Exception as error:  # any error: the run has its earlier checkpoints
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


@contextmanager
def open_checkpointer(
    run_folder: Path | None,
    tensors: Tree,
    *,
    device: torch.device,
    keep: int,
    before: Callable[[], None],
    report: Callable[[Header, Row], None],
) -> Iterator[Checkpointer]:
    """Open the checkpointer, on the rank that has the run folder; the others save nothing.

    Args:
        run_folder: The run folder, on rank 0.
        tensors: Tensors like those to come.
        device: Where they are.
        keep: Newest checkpoints that stay.
        before: Is called before each write.
        report: Takes the header of a save, and a row about how it ended.

    Raises:
        ConfigError: The state holds objects that a resume could not load safely.
        OutputError: The folder of checkpoints cannot be made.
    """
    if run_folder is None:
        yield NoCheckpointer()
        return
    folder = CheckpointFolder(run_folder / FOLDER_NAME)
    try:
        make_folder(folder.path)
    except OSError as error:
        raise unwritable(folder.path, error) from error
    refuse_foreign(tensors["model"])
    with AsyncCheckpointer(
        folder, tensors, device=device, keep=keep, before=before, report=report
    ) as checkpointer:
        yield checkpointer


def _out_of_memory(error: Exception | None) -> str | None:
    return describe_out_of_memory(error, Use.SNAPSHOT) if error else None


def _reason(error: Exception | None) -> str:
    if text := _out_of_memory(error):
        return text
    return getattr(error, "strerror", None) or (first_line(error) if error else "")
