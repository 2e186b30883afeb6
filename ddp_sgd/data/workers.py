"""Worker processes of data loaders: how they start, what leaves them, and signals to the job."""

import atexit
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from multiprocessing.sharedctypes import RawValue
from types import FrameType
from typing import Any, TypeVar

from ddp_sgd.data.fetcher import Unreadable

_Batch = TypeVar("_Batch")


def start_method() -> str:
    """Start method of loader processes: as on Linux before Python 3.14, unless one is set.

    A forked process has the data set as it is. That of a fork server, Python 3.14's default, or one
    that is spawned has what a pickle of it holds, if there can be one, and imports torch again.
    """
    chosen = multiprocessing.get_start_method(allow_none=True)
    own = multiprocessing.get_all_start_methods()[0]  # a process that was started may have set it
    if chosen is not None and chosen != own:
        return chosen
    return "fork" if sys.platform == "linux" else "spawn"


class Departure:
    """Passes batches on unchanged, once the first shows that batches can leave a loader process.

    One that cannot be serialized would be lost on the way, and the rank would wait without an end.

    Args:
        workers: Number of loader processes.
        where: Key of the data set in the configuration, for errors.
    """

    def __init__(self, workers: int, where: str) -> None:
        self._workers = workers
        self._where = where
        self._checked = False

    def __call__(self, batch: Any) -> Any:
        """Return the batch; ``Unreadable`` if it cannot leave the process."""
        if not self._checked:
            self._checked = True
            try:
                ForkingPickler.dumps(batch)
            except Exception as error:  # each type has its own
                return Unreadable(
                    f"data.workers is {self._workers} while a batch of {self._where} cannot leave "
                    f"its loader process, {type(error).__name__}: {' '.join(str(error).split())}; "
                    "return tensors without gradients and plain containers, or set data.workers=0."
                )
        return batch


def start_workers(loader: Iterable[_Batch]) -> Iterator[_Batch]:
    """Return the iterator of a DataLoader, whose processes are forked without garbage collection.

    What the rank leaves behind may hold memory of a GPU. To free that aborts a forked process, so
    none collects garbage until ``leave_signals_to_the_rank`` has exempted what it began with.

    Args:
        loader: The DataLoader.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return iter(loader)
    finally:
        if was_enabled:
            gc.enable()


def leave_signals_to_the_rank(leaving: Any, _: int) -> None:
    """Have a loader process ignore a signal to the whole job, so that the rank can save.

    Args:
        leaving: Shared flag; once it is set, SIGTERM ends the process, or nothing could.
    """
    gc.freeze()  # see start_workers
    gc.enable()

    def note(number: int, _: FrameType | None) -> None:
        if leaving.value and number == signal.SIGTERM:
            os._exit(0)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)


def flag_of_leaving() -> Any:
    """Make a flag, shared with loader processes, that is set when this process begins to exit."""
    leaving = RawValue("b", 0)

    def leave() -> None:
        leaving.value = 1

    atexit.register(leave)  # runs before multiprocessing's own hook, which was registered earlier
    return leaving
