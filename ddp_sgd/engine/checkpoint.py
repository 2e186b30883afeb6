"""The state of a run on its way to the disk: copied between steps, written in the background."""

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from ddp_sgd.checkpointing.folder import FOLDER_NAME, CheckpointFolder
from ddp_sgd.checkpointing.manifest import Header, Manifest
from ddp_sgd.checkpointing.snapshot import Snapshot
from ddp_sgd.checkpointing.writing import write_checkpoint
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.engine.assembly import Job
from ddp_sgd.engine.capture import Tree, capture, refuse_foreign
from ddp_sgd.engine.state import State
from ddp_sgd.errors import OutputError
from ddp_sgd.report.reporter import Reporter
from ddp_sgd.report.run_folder import RunFolder, unwritable
from ddp_sgd.report.sink import Row

_PATIENCE = 3
"""Saves in a row that may fail before the run ends."""

_SLOWEST_DISK = 1e8
"""Bytes a second that a disk writes at least, before anything is measured."""


class Checkpoints(Protocol):
    """Where the state goes; on rank 0 to the disk, elsewhere nowhere."""

    save_s: float

    def save(self, state: State, memory: Tree) -> None:
        """Save the state as it is now; training may go on when this returns.

        Args:
            state: Where the run stands.
            memory: What the replica remembers besides weights.
        """

    def poll(self) -> None:
        """Tell of a save that has ended since."""

    def finish(self) -> None:
        """Wait for the last save."""


class NoCheckpoints:
    """Saves nothing: what every rank but 0 holds."""

    save_s = 0.0

    def save(self, state: State, memory: Tree) -> None:
        """Do nothing."""

    def poll(self) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


class SavedCheckpoints:
    """Writes in the background, from a copy, one save at a time.

    A save that fails is told at once, and the run goes on with the checkpoints that it has; three
    in a row end it.

    Args:
        folder: Where to.
        capture: Gives the header and the tensors of a state.
        device: Where the tensors are.
        keep: Newest checkpoints that are kept.
        tell: Takes a row about a save: the header of it, and what is to be said.
        before: Is called in the background before each save; where there is a checkpoint, this was
            done.

    Attributes:
        save_s: How long the last save took from its beginning to its end, in seconds; before the
            first, an estimate.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        capture: Callable[[State], tuple[Header, Tree]],
        device: torch.device,
        *,
        keep: int,
        tell: Callable[[Header, Row], None],
        before: Callable[[], None],
    ) -> None:
        self._folder = folder
        self._capture = capture
        self._keep = keep
        self._tell = tell
        self._before = before
        self._snapshot = Snapshot(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[tuple[Manifest, float]] | None = None
        self._header: Header | None = None
        self._start = self._stall_s = 0.0
        self._failures = 0
        self._failure: Exception | None = None
        _, tensors = capture(State())
        refuse_foreign(tensors["model"])
        self.save_s = 1.0 + _bytes_of(tensors) / _SLOWEST_DISK
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

    def save(self, state: State, memory: Tree) -> None:
        """Copy the state, and write the copy in the background.

        Args:
            state: Where the run stands.
            memory: What the replica remembers besides weights; saved as ``compression``.

        Raises:
            OutputError: This many saves in a row have failed.
        """
        start = time.perf_counter()
        self._reserved.result()
        self._settle()  # measures the save before from its own start
        self._start = start
        self._header, tensors = self._capture(state)
        copy = self._snapshot.take({**tensors, "compression": memory} if memory else tensors)
        self._writing = self._thread.submit(self._write, self._header, copy)
        self._stall_s = time.perf_counter() - self._start

    def poll(self) -> None:
        """Tell of a save that has ended since.

        Raises:
            OutputError: This many saves in a row have failed.
        """
        if self._writing is not None and self._writing.done():
            self._settle()

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            OutputError: It failed.
        """
        self._settle()
        if self._failure is not None:
            raise self._unsaved()

    def _write(self, header: Header, tensors: Tree) -> tuple[Manifest, float]:
        self._before()
        self._snapshot.wait()
        manifest = write_checkpoint(self._folder, header, tensors, keep=self._keep)
        return manifest, time.perf_counter()

    def _settle(self) -> None:
        """Wait for the save that is going on, if there is one, and tell of it."""
        if self._writing is None or self._header is None:
            return
        writing, self._writing = self._writing, None
        try:
            manifest, end = writing.result()
        except Exception as error:  # whatever it is, the run has its earlier checkpoints
            self._failures += 1
            self._failure = error
            self._tell(self._header, {"error": f"not written: {_reason(error)}"})
            if self._failures >= _PATIENCE:
                raise self._unsaved() from error
            return
        self._failures, self._failure = 0, None
        self.save_s = end - self._start
        self._tell(
            self._header,
            {
                "file": manifest.file,
                "bytes": manifest.size_bytes,
                "save_s": self.save_s,
                "stall_s": self._stall_s,
            },
        )

    def _unsaved(self) -> OutputError:
        times = f", {self._failures} times in a row" if self._failures > 1 else ""
        return OutputError(
            f"{self._folder.path} does not take a checkpoint{times}: {_reason(self._failure)}; "
            "make room on its disk, or set output_dir to another, and start again."
        )


@contextmanager
def open_checkpoints(
    config: RunConfig, job: Job, run_id: str, folder: RunFolder | None, report: Reporter
) -> Iterator[Checkpoints]:
    """Open the way of the state to the disk, on the rank that has the run folder.

    Args:
        config: Description of the run.
        job: The run, ready to start.
        run_id: Identity of the run.
        folder: The run folder, on rank 0.
        report: Is told of every save.

    Raises:
        OutputError: The folder of checkpoints cannot be made.
    """
    if folder is None:
        yield NoCheckpoints()
        return
    saved = CheckpointFolder(folder.path / FOLDER_NAME)
    try:
        saved.path.mkdir(exist_ok=True)
    except OSError as error:
        raise unwritable(saved.path, error) from error
    with SavedCheckpoints(
        saved,
        partial(
            capture,
            model=job.replica.inner,
            optimizer=job.optimizer,
            plan=job.plan,
            config=config,
            run_id=run_id,
            loss=job.loss,
        ),
        job.device,
        keep=config.checkpoint.keep,
        tell=lambda header, row: report.checkpoint(header.step, row),
        before=report.catch_up,  # a run that is killed has every row up to where it goes on
    ) as checkpoints:
        yield checkpoints


def _bytes_of(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    return sum(map(_bytes_of, tree.values())) if isinstance(tree, Mapping) else 0


def _reason(error: Exception | None) -> str:
    strerror = getattr(error, "strerror", None)
    return strerror or (str(error).strip() or type(error).__name__).splitlines()[0]
