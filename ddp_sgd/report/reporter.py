"""The reporter: rows of metrics, with their place in the run, to every logger of rank 0.

Asynchronous writer: rows are written by a thread, off the path of the step.
"""

import math
import os
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ddp_sgd.config import RunConfig
from ddp_sgd.console import say
from ddp_sgd.distributed.environment import attempt_of_job
from ddp_sgd.errors import ExitCode, UserError
from ddp_sgd.host import scaled
from ddp_sgd.plan import Plan
from ddp_sgd.report.journal import Journal, Logger, Origin, Row, RunRecord
from ddp_sgd.report.progress import Progress, last_line
from ddp_sgd.report.run_folder import RunFolder
from ddp_sgd.report.tensorboard import TensorBoard
from ddp_sgd.report.wandb_logger import WandbLogger
from ddp_sgd.text import mask

if TYPE_CHECKING:
    from ddp_sgd.distributed.runtime import Runtime

BURST_S = 0.1
"""How long rows gather before they are written together. Each time the writing thread takes the
interpreter from the training thread costs both a switch: few long turns are cheaper than many."""

MOST_ROWS = 10_000
"""Rows that may wait for a slow disk; then training waits, since none may be lost."""

_GIT_TIMEOUT_S = 5.0
"""How long ``git`` may take; a large working tree on a network file system is not worth more."""


class _PendingRow(NamedTuple):
    """A row as it is handed over: its place in the run follows from the step."""

    event: str
    time: float
    step: int
    row: Row


class AsyncWriter:
    """Writes rows in a thread of its own, in order, in bursts.

    Args:
        write: Takes the rows of a burst. What it raises comes up in the next ``put`` or ``flush``,
            and the rest of that burst is lost.
    """

    def __init__(self, write: Callable[[list[_PendingRow]], None]) -> None:
        """Start the thread."""
        self._write = write
        self._waiting: deque[_PendingRow] = deque()
        self._turn = threading.Lock()
        self._arrived, self._over = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="ddp_sgd-async-writer", daemon=True)
        self._thread.start()

    def put(self, row: _PendingRow) -> None:
        """Take a row, which must not change any more; waits only if too many wait already."""
        self._waiting.append(row)
        if self._failure or len(self._waiting) >= MOST_ROWS:
            self.flush()
        elif not self._arrived.is_set():
            self._arrived.set()

    def flush(self) -> None:
        """Return when all rows so far are written; this thread writes what is left itself."""
        with self._turn:
            self._write_burst()
            failure, self._failure = self._failure, None
        if failure:
            raise failure

    def catch_up(self) -> None:
        """Flush from another thread: what failed comes up in the next call of the first one."""
        with self._turn:
            self._write_burst()

    def close(self) -> None:
        """Write what is left, and end the thread."""
        self._over.set()
        self._arrived.set()
        self._thread.join()
        self.flush()

    def _work(self) -> None:
        while not self._over.is_set():
            self._arrived.wait()
            self._over.wait(BURST_S)
            self._arrived.clear()  # before the look: what comes during it has another turn
            with self._turn:
                self._write_burst()

    def _write_burst(self) -> None:
        burst = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not burst:
            return
        try:
            self._write(burst)
        except Exception as error:  # any error is raised in the thread that trains
            self._failure = self._failure or error


class Progressing(Protocol):
    """State that knows the step of the run."""

    step: int


class Reporter:
    """Gives every row its time and place, and writes the result however the run ends.

    The training thread only notes the time and the step of a row; an ``AsyncWriter`` writes it, a
    tenth of a second later, and before a checkpoint that it belongs to. What a logger raises comes
    up in the next call. Processes that the user's code or a loader forked have no part in this, and
    write nothing.

    Args:
        folder: The run folder, which keeps the result; None writes nothing.
        loggers: They open when the plan is known, and each gets every row, the first logger first.
        config: Description of the run.
        world_size: Ranks.
        origin: Where this attempt of the run begins.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        loggers: Sequence[Logger],
        config: RunConfig,
        world_size: int,
        origin: Origin,
    ) -> None:
        self._folder = folder
        self._loggers = loggers
        self._opened: list[Logger] = []
        self._writer: AsyncWriter | None = None
        self._pid = os.getpid()
        self._config = config
        self._world_size = world_size
        self._origin = origin
        job = attempt_of_job(os.environ)
        self._job = {"job": job} if job else {}
        self._commit = GitCommit() if folder is not None else None
        self._start = time.perf_counter()
        self._plan: Plan | None = None
        self._state: Progressing | None = None
        self._notices: list[str] = []

    def start(self, plan: Plan, state: Progressing, notes: tuple[str, ...] = ()) -> None:
        """Open the loggers, and log that the run starts, or goes on.

        Args:
            plan: The run's arithmetic.
            state: Read for the step of every row.
            notes: What the user should know, one line each.
        """
        self._plan, self._state = plan, state
        if self._folder is None:
            return
        origin = self._origin
        self._folder.begin(plan)
        self._writer = AsyncWriter(self._write_burst)
        notes = (*notes, *self._notices)
        record = RunRecord(
            folder=self._folder.path, config=self._config, plan=plan, origin=origin, notes=notes
        )
        for logger in self._loggers:
            logger.start(record)
            self._opened.append(logger)
        commit = self._commit.wait() if self._commit else None
        code: Row = {"git_commit": commit} if commit else {}
        world: Row = {"world_size": self._world_size, **self._job, **code}
        if not origin.has_rows:
            self._write("start", {**world, "run_id": origin.run_id})
        if origin.is_resumed:
            self._write("resume", {**world, **origin.note})
        self.flush()  # if the run ends at once, its journal shows that it began

    def notice(self, line: str) -> None:
        """Print what turns out and the user should know: below the plan, or at once after that."""
        if self._plan is None:
            self._notices.append(line)
        elif self._folder is not None and self._pid == os.getpid():
            say(f"note      {line}")

    def train(self, row: Row | None) -> None:
        """Log what the steps since the last row measured, if there is a row."""
        if row is not None:
            self._write("train", row)

    def eval(self, scores: Row) -> None:
        """Log how the model scored, if it did."""
        if scores:
            self._write("eval", scores)

    def checkpoint(self, step: int, row: Row) -> None:
        """Log what became of a save.

        Args:
            step: The step that was saved; the run is further by now.
            row: The file, or what went wrong.
        """
        self._write("checkpoint", row, step)

    def stop(self, reason: str | None) -> None:
        """Log that the run ends early, on a stop request."""
        self._write("stop", {"reason": reason or "another rank was asked to stop"})

    def flush(self) -> None:
        """Return when all rows so far are written.

        Raises:
            OutputError: The journal cannot be written.
        """
        if self._writer and self._pid == os.getpid():
            self._writer.flush()

    def catch_up(self) -> None:
        """Write the rows so far, from any thread; a fault comes up in that which trains."""
        if self._writer:
            self._writer.catch_up()

    def end(self, result: Row) -> None:
        """Log how the run ended, and close the loggers."""
        self._write("end", {"status": result["status"]})
        self.flush()
        self._close(result)

    def fail(self, error: BaseException) -> None:
        """Write down that the run failed, or was stopped before its first step, and why.

        What cannot be written then is lost.
        """
        code = error.exit_code if isinstance(error, UserError) else ExitCode.INTERNAL
        status = "stopped" if code == ExitCode.STOPPED else "failed"
        result = {
            "status": status,
            "exit_code": int(code),
            **self._place(),
            "world_size": self._world_size,
            "error": mask(str(error)) or type(error).__name__,
        }
        with suppress(UserError):
            self.flush()
        with suppress(UserError):
            if self._plan:
                self._write("end", {"status": status, "error": result["error"]})
                self.flush()
        with suppress(UserError):
            self._close(result)

    def _close(self, result: Mapping[str, Any]) -> None:
        if self._folder is None or self._pid != os.getpid():
            return
        wall = {"wall_s": time.perf_counter() - self._start}
        full = _finite({**result, **self._job, **wall})
        try:  # the result first: loggers may be slow, and a launcher's timeout may pass
            self._folder.finish(full)
        finally:
            if self._writer:
                self._writer.close()
            for logger in reversed(self._opened):
                logger.finish(full)

    def _write(self, event: str, row: Row, step: int | None = None) -> None:
        if self._plan is None:
            raise RuntimeError(f"row {event!r} was written before the run had a plan")
        if self._writer and self._state and self._pid == os.getpid():
            at = self._state.step if step is None else step
            self._writer.put(_PendingRow(event, time.time(), at, row))

    def _write_burst(self, pending: list[_PendingRow]) -> None:
        if self._folder:
            self._folder.check()
        rows = [
            (event, _finite({"time": at, **self._place(step), **row}))
            for event, at, step, row in pending
        ]
        for logger in self._opened:
            logger.write(rows)

    def _place(self, step: int | None = None) -> dict[str, int | float]:
        """Where the run is, or was after a step; before it has a plan, where it began."""
        plan, state = self._plan, self._state
        if plan is None or state is None:
            origin = self._origin
            return {"step": origin.step, "epoch": origin.epoch, "samples": origin.samples}
        step = state.step if step is None else step
        return {"step": step, "epoch": plan.epoch_at(step), "samples": plan.samples_at(step)}


@contextmanager
def open_report(
    config: RunConfig, runtime: "Runtime", folder: RunFolder | None, origin: Origin
) -> Iterator[Reporter]:
    """Make the loggers, on the rank that has the run folder; the other ranks log nothing.

    Args:
        config: Description of the run.
        runtime: This process.
        folder: The run folder, on rank 0.
        origin: Where this attempt of the run begins.

    Raises:
        ConfigError: A logger that the configuration enables is not installed.
    """
    loggers = _loggers(config) if folder else []
    report = Reporter(folder, loggers, config, runtime.world_size, origin)
    runtime.error_propagation.before_exit = report.fail
    try:
        yield report
    except BaseException as error:
        report.fail(error)
        raise
    finally:
        runtime.error_propagation.before_exit = None


def report_end(result: Row, folder: RunFolder | None) -> None:
    """Print how a run ended that has nothing left to do, on the rank that has its folder."""
    if folder is not None:
        Progress().say(
            f"{last_line(result)}, results in {folder.path}; nothing is left to do "
            "(resume=never trains again)"
        )


def _loggers(config: RunConfig) -> list[Logger]:
    progress = Progress()
    loggers: list[Logger] = [Journal(), progress, WandbLogger(config.wandb, echo=progress.say)]
    if config.log.tensorboard:
        loggers.append(TensorBoard(echo=progress.say))
    return loggers


def _finite(row: Row) -> Row:
    """Replace NaN and infinity by None, since strict JSON has neither."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


class GitCommit:
    """The git commit of the working directory, looked up in a thread while the run is set up."""

    def __init__(self) -> None:
        """Start ``git``."""
        self._commit: str | None = None
        self._thread = threading.Thread(
            target=self._look_up, name="ddp_sgd-git-commit", daemon=True
        )
        with suppress(RuntimeError):  # the system has no thread left for us
            self._thread.start()

    def wait(self) -> str | None:
        """Return the commit, ``+changes`` appended if files differ; None if there is none."""
        if self._thread.ident is not None:
            self._thread.join(scaled(_GIT_TIMEOUT_S))
        return self._commit

    def _look_up(self) -> None:
        command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"]
        with suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=scaled(_GIT_TIMEOUT_S),
                check=False,
            )
            self._commit = done.stdout.strip() or None
