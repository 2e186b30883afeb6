"""Process exit: at once, past threads that are stuck, with the files that a launcher reads.

Calls with a timeout leave such threads behind. No torch.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NoReturn, TypeVar, cast

from ddp_sgd.console import settle
from ddp_sgd.distributed.environment import may_be_rank_0

T = TypeVar("T")


def call_with_timeout(limit_s: float, work: Callable[[], T]) -> T:
    """Return what the work returns, or raise what it raises, unless it takes too long.

    torch's store client may wait for ever for a host that does not respond, despite its timeout.

    Args:
        limit_s: Longest wait, in seconds; work that takes longer is left to itself.
        work: Called in a thread.

    Raises:
        TimeoutError: The work is not done.
    """
    answers: SimpleQueue[tuple[object, Exception | None]] = SimpleQueue()

    def run() -> None:
        try:
            answers.put((work(), None))
        except Exception as error:  # the caller's to handle
            answers.put((None, error))

    threading.Thread(target=run, name="ddp_sgd-bounded", daemon=True).start()
    try:
        value, error = answers.get(timeout=limit_s)
    except Empty:
        raise TimeoutError("there is no answer") from None
    if error:
        raise error
    return cast("T", value)


def run_with_timeout(limit_s: float, work: Callable[[], object]) -> None:
    """Do some work as far as it goes; an error is dropped, and work that takes too long left alone.

    Args:
        limit_s: Longest wait, in seconds.
        work: Called in a thread.
    """
    with suppress(Exception):
        call_with_timeout(limit_s, work)


def leave(code: int) -> NoReturn:
    """Exit with a code, even if threads of this package are still in a call.

    The interpreter ends a daemon thread that comes back from C++ by unwinding its stack, which
    aborts the process: exit code -6 in place of the run's. So does freeing memory of a GPU that
    failed. Where there is either, exit hooks are left out.
    """
    names = [thread.name for thread in threading.enumerate() if thread.daemon]
    if any(name.startswith("ddp_sgd-") for name in names) or (code and _has_failed_device()):
        settle()
        os._exit(code)
    sys.exit(code)


def _has_failed_device() -> bool:
    """Whether a CUDA device that this process uses does nothing any more."""
    torch: Any = sys.modules.get("torch")
    try:
        if torch and torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


EXIT_CODE_FILE = "LAUNCH_EXIT_CODE_FILE"
"""Variable that names the file in which a launch script looks for the exit code of a rank."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable that names the file of each rank from which torchrun takes the error for its report."""


def leave_for_launcher(
    code: int, message: str, *, traceback: str = "", is_first: bool = True
) -> None:
    """Record how this process ends in its launcher's files, if any; a disk fault is dropped.

    torchrun exits with 1 for every code, and without the error it reports ``error_file:
    <N/A>`` as the last thing on the screen. Every rank leaves the line of the rank that failed
    first, since torchrun may see any of them end before it ends the others.

    Args:
        code: Exit code of this process.
        message: The line for the user.
        traceback: Where the error comes from, shown above the line; empty if not requested.
        is_first: Whether this rank failed first, as far as is known.
    """
    with suppress(OSError):
        _leave_code(code)
    with suppress(OSError):
        _leave_error(code, message, traceback, is_first=is_first)


def _leave_code(code: int) -> None:
    """Leave the code for launch scripts, from the first rank of each host.

    Rank 0 may be on another, without a shared disk. A run that was refused leaves no
    ``result.json``: that would be another run's.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if path and (may_be_rank_0(os.environ) or os.environ.get("LOCAL_RANK") == "0"):
        Path(path).write_text(f"{int(code)}\n")


def _leave_error(code: int, message: str, traceback: str, *, is_first: bool) -> None:
    """Leave the error in torchrun's format, once: what a process ran into first is the cause.

    Source:
        ``ErrorHandler`` of torch.distributed.elastic.multiprocessing.errors, whose report names the
        failure with the least timestamp, in whole seconds, and shows ``py_callstack``.
    """
    path = os.environ.get(ERROR_FILE)
    if not path or code == 0 or Path(path).exists():
        return
    now_s = int(time.time())
    extra = {
        "py_callstack": f"{traceback}{message}",
        "timestamp": str(now_s if is_first else now_s + 1),  # after a cause of the same second
    }
    report = {"message": {"message": message, "errorCode": int(code), "extraInfo": extra}}
    whole = Path(f"{path}.{os.getpid()}.tmp")  # torchrun fails on a file that is half written
    whole.write_text(json.dumps(report))
    whole.replace(path)
