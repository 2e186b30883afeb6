"""Checkpointer: the state is copied between steps and written in the background."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from ddp_sgd.checkpointing.folder import FOLDER_NAME, CheckpointFolder
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.config.schema import RunConfig
from ddp_sgd.engine.fingerprint import with_marks
from ddp_sgd.engine.setup import Job
from ddp_sgd.engine.train_state import State, Tree, capture, other_state_dict, refuse_foreign
from ddp_sgd.engine.writers import Writer, build_writer, bytes_of
from ddp_sgd.errors import OutputError
from ddp_sgd.files import make_folder
from ddp_sgd.out_of_memory import Use, describe_out_of_memory
from ddp_sgd.report.logger import Row
from ddp_sgd.report.reporter import Reporter
from ddp_sgd.report.run_folder import RunFolder, unwritable

_PATIENCE = 3
"""Saves in a row that may fail before the run ends."""

_SLOWEST_DISK = 1e8
"""Bytes a second that a disk writes at least, before anything is measured."""


class Checkpoints(Protocol):
    """Where the state goes; on rank 0 to the disk, elsewhere nowhere."""

    save_s: float

    def save(self, state: State, wrapper_state: Tree) -> None:
        """Save the state as it is now; training may go on when this returns.

        Args:
            state: Where the run stands.
            wrapper_state: State of the data-parallel wrapper besides weights.
        """

    def poll(self) -> None:
        """Tell of saves that have ended since."""

    def finish(self) -> None:
        """Wait for the last save."""


class NoCheckpoints:
    """Saves nothing: what every rank but 0 holds."""

    save_s = 0.0

    def save(self, state: State, wrapper_state: Tree) -> None:
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
    """

    header: Header
    start: float
    stall_s: float


class SavedCheckpoints:
    """Writes in the background.

    A save that fails is told at once, and the run goes on with the checkpoints that it has; three
    in a row end it.

    Args:
        folder: Where to.
        capture: Gives the header and the tensors of a state.
        build: Makes what writes, given tensors like those to come.
        tell: Takes a row about a save: the header of it, and what is to be said.

    Attributes:
        save_s: How long the last save took from its beginning to its end, in seconds; before the
            first, an estimate.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        capture: Callable[[State], tuple[Header, Tree]],
        build: Callable[[Tree], Writer],
        *,
        tell: Callable[[Header, Row], None],
    ) -> None:
        self._folder = folder
        self._capture = capture
        self._tell = tell
        self._going: deque[_Save] = deque()
        self._failures = 0
        self._failure: Exception | None = None
        _, tensors = capture(State())
        refuse_foreign(tensors["model"])
        self.save_s = 1.0 + bytes_of(tensors) / _SLOWEST_DISK
        self._writer = build(tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for a save that is going on: half of it is of no use to anyone."""
        self._writer.close()

    def save(self, state: State, wrapper_state: Tree) -> None:
        """Take the state as it is now, and write it in the background.

        Args:
            state: Where the run stands.
            wrapper_state: Of the data-parallel wrapper, besides weights; saved as ``compression``.

        Raises:
            OutputError: This many saves in a row have failed.
        """
        start = time.perf_counter()
        self.poll()
        while len(self._going) >= self._writer.at_once:
            self._settle()
        header, tensors = self._capture(state)
        self._writer.begin(
            header, {**tensors, "compression": wrapper_state} if wrapper_state else tensors
        )
        self._going.append(_Save(header, start, time.perf_counter() - start))

    def poll(self) -> None:
        """Tell of saves that have ended since.

        Raises:
            OutputError: This many saves in a row have failed.
        """
        while self._going and self._writer.is_over():
            self._settle()

    def finish(self) -> None:
        """Wait for the last save.

        Raises:
            OutputError: It failed.
        """
        while self._going:
            self._settle()
        if self._failure is not None:
            raise self._unsaved()

    def _settle(self) -> None:
        """Wait for the earliest save that is going on, and tell of it."""
        save = self._going.popleft()
        try:
            written = self._writer.wait()
        except Exception as error:  # whatever it is, the run has its earlier checkpoints
            self._failures += 1
            self._failure = error
            self._tell(save.header, {"error": f"not written: {_reason(error)}"})
            if self._failures >= _PATIENCE:
                raise self._unsaved() from error
            return
        self._failures, self._failure = 0, None
        self.save_s = written.end - save.start
        self._tell(
            save.header,
            {
                "file": written.file,
                "bytes": written.num_bytes,
                "save_s": self.save_s,
                "stall_s": save.stall_s,
            },
        )

    def _unsaved(self) -> OutputError:
        times = f", {self._failures} times in a row" if self._failures > 1 else ""
        remedy = "make room on its disk, or set output_dir to another, and start again"
        text = _out_of_memory(self._failure) or f"{_reason(self._failure)}; {remedy}"
        return OutputError(f"{self._folder.path} does not take a checkpoint{times}: {text}.")


@contextmanager
def open_checkpoints(
    config: RunConfig, context: Job, run_id: str, folder: RunFolder | None, report: Reporter
) -> Iterator[Checkpoints]:
    """Open the way of the state to the disk, on the rank that has the run folder.

    Args:
        config: Description of the run.
        context: The run, ready to start.
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
        make_folder(saved.path)
    except OSError as error:
        raise unwritable(saved.path, error) from error
    with SavedCheckpoints(
        saved,
        with_marks(
            context.marks,
            partial(
                _capture,
                context,
                optimizer=context.optimizer,
                plan=context.plan,
                config=config.model_dump(mode="json"),
                run_id=run_id,
                loss=context.loss,
            ),
        ),
        partial(
            build_writer,
            folder=saved,
            device=context.device,
            keep=config.checkpoint.keep,
            before=report.catch_up,  # a run that is killed has every row up to where it goes on
        ),
        tell=lambda header, row: report.checkpoint(header.step, row),
    ) as checkpoints:
        yield checkpoints


def _capture(context: Job, state: State, **others: Any) -> tuple[Header, Tree]:
    """Gather all that a resume of this job needs."""
    header, tree = capture(state, model=context.wrapper.inner, **others)
    return header, {
        **tree,
        **other_state_dict(context.wrapper.inner, context.loss_modules, context.buffers),
    }


def _out_of_memory(error: Exception | None) -> str | None:
    return describe_out_of_memory(error, Use.SNAPSHOT) if error else None


def _reason(error: Exception | None) -> str:
    if text := _out_of_memory(error):
        return text
    strerror = getattr(error, "strerror", None)
    return strerror or (str(error).strip() or type(error).__name__).splitlines()[0]
