"""Exit code and error files for the launcher (torchrun's error file). No torch."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

from ddp_sgd.distributed.environment import may_be_rank_0

EXIT_CODE_FILE = "LAUNCH_EXIT_CODE_FILE"
"""Variable that names the file in which a launch script looks for the exit code of a rank."""
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Variable that names the file of each rank from which torchrun takes the error for its report."""


def leave_for_launcher(
    code: int, message: str, *, traceback: str = "", is_first: bool = True
) -> None:
    """Write down how this process ends, where its launcher asked for it; a disk fault is dropped.

    torchrun exits with 1 whatever the code was, and without the error it reports ``error_file:
    <N/A>`` as the last thing on the screen. Every rank leaves the line of the rank that failed
    first, since torchrun may see any of them end before it ends the others.

    Args:
        code: Exit code of this process.
        message: The line for the user.
        traceback: Where the error comes from, shown above the line; empty where nobody asked.
        is_first: Whether this rank failed first, as far as is known.
    """
    with suppress(OSError):
        _leave_code(code)
    with suppress(OSError):
        _leave_error(code, message, traceback, is_first=is_first)


def _leave_code(code: int) -> None:
    """Leave the code for launch scripts, from the first rank of each host.

    Rank 0 may be on another, without a shared disk. A run that was refused leaves no
    ``result.json``: that would be somebody else's.
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
