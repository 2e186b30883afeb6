"""Error propagation where collectives do not raise: a thread polls the first reported error.

A collective of gloo raises as soon as a peer leaves. One on a GPU does not: the host waits for the
device, in ``tolist`` or in a copy, and the device waits for a peer that will not come.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ErrorType
from torch.distributed.distributed_c10d import Store

from ddp_sgd.console import report_error
from ddp_sgd.distributed.error_propagation import ErrorPropagation, StoreErrorPropagation
from ddp_sgd.distributed.process_exit import leave_for_launcher, run_with_timeout
from ddp_sgd.errors import ExitCode, RemoteError, UserError
from ddp_sgd.host import scaled

_POLL_S = 1.0
"""Time between two looks at the store, in seconds."""
_GRACE_S = scaled(3.0)
"""Time for the training thread to raise an error of its own, once another rank reported one."""
_WRITE_S = scaled(5.0)
"""Longest wait for the line, and for the launcher's files: what hangs may be the terminal."""
_RESULT_S = scaled(60.0)
"""Longest wait for what has to be written before the process ends."""
_ABORT_S = scaled(2.0)
"""Longest wait for the communicator to be aborted."""
_LEAVE_S = 0.5
"""Longest wait for this thread, where the host of the store does not respond."""


@contextmanager
def watch_errors(
    error_propagation: StoreErrorPropagation, store: Store, device: torch.device
) -> Iterator[None]:
    """End this process soon after another rank failed, even if its main thread waits for ever.

    The main thread has a few seconds to find the error by itself, which it does wherever a
    collective raises. Else ``end_process`` ends the process with the code of the rank that failed
    first, without a word: that rank has reported it. An error of the communicator itself, such as
    that of NCCL, counts too.

    Args:
        error_propagation: Knows the first error, and whether this rank has found one.
        store: Client of the store for this thread alone.
        device: Where the group computes.
    """
    over = threading.Event()

    def run() -> None:
        is_store_there = True
        while not over.wait(_POLL_S):
            error: Exception | None = None
            if is_store_there:
                try:
                    error = error_propagation.find_remote(store)
                except Exception:  # the store is gone with its host, which others report
                    is_store_there = False
            error = error or _communicator_error(device)
            if error:
                if not (error_propagation.has_resolved.wait(_GRACE_S) or over.is_set()):
                    end_process(error, error_propagation)
                return

    thread = threading.Thread(target=run, name="ddp_sgd-errors", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(_LEAVE_S)


def end_process(error: Exception, error_propagation: ErrorPropagation) -> NoReturn:
    """End a process whose main thread does not come back, with the code of the first error.

    The line is printed, unless another rank has reported the error; ``before_exit`` is called with
    it, and the communicator is aborted.

    Args:
        error: Why it ends.
        error_propagation: Of this rank.
    """
    error = error_propagation.resolve(error)
    code = error.exit_code if isinstance(error, UserError) else ExitCode.INTERNAL
    is_first = not isinstance(error, RemoteError)
    try:
        if is_first:
            run_with_timeout(_WRITE_S, partial(report_error, error))
        run_with_timeout(_WRITE_S, partial(leave_for_launcher, code, str(error), is_first=is_first))
        if error_propagation.before_exit:
            run_with_timeout(_RESULT_S, partial(error_propagation.before_exit, error))
        if error_propagation.farewell:
            error_propagation.farewell()
        run_with_timeout(_ABORT_S, abort_group)
    finally:
        os._exit(code)


def _communicator_error(device: torch.device) -> Exception | None:
    """Return the error that the backend reports; None if there is none, or it reports nothing."""
    if device.type == "cpu" or not dist.is_initialized():
        return None
    with suppress(Exception):  # a backend without get_error
        error = dist.group.WORLD._get_backend(device).get_error()  # type: ignore[union-attr]
        if error != ErrorType.SUCCESS:
            return dist.DistNetworkError(f"{dist.get_backend()} reports {error.name}")
    return None


def abort_group() -> None:
    """Abort the communicators of all groups, if there are any and their library can be aborted.

    Unlike ``destroy_process_group`` this does not wait for what is under way on the device.
    """
    if dist.is_initialized() and dist.get_backend() == dist.Backend.NCCL:
        dist.distributed_c10d._abort_process_group()
