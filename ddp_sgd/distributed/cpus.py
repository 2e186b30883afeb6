"""CPUs and GPUs that this process may use: CPU affinity, scheduling policy, GPU count. No torch."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from ddp_sgd.time_limits import scaled

_NARROWED_BY = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)
_OTHER_TOOLS = ("rocm-smi", "amd-smi", "rocminfo", "xpu-smi", "sycl-ls")
"""Tools of ROCm and XPU, whose output differs by release; that they are there is enough."""
_COUNT = "import torch; print(torch.accelerator.device_count())"


def usable_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def batch_scheduling() -> Iterator[None]:
    """Have the threads and processes that are started here wait for a CPU, not interrupt.

    Under the usual policy a thread that wakes up interrupts the one that runs. gloo's thread, woken
    by the other rank, so interrupts the rank in the midst of a call, and spins for a lock that the
    rank holds: with all CPUs in use, steps of two ranks take three times as long. On Linux this
    thread gets the policy that is meant for such work; where it is not as usual it stays.

    Source:
        sched(7), SCHED_BATCH.
    """
    is_changed = _change_policy("SCHED_OTHER", "SCHED_BATCH")
    try:
        yield
    finally:
        if is_changed:
            _change_policy("SCHED_BATCH", "SCHED_OTHER")


def leave_batch_scheduling() -> None:
    """Give this thread the usual policy again: for short turns between waits."""
    _change_policy("SCHED_BATCH", "SCHED_OTHER")


def _change_policy(before: str, after: str) -> bool:
    """Change the policy of this thread, if it is as expected; False where that cannot be done."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # forbidden in a container, or another C library
            if os.sched_getscheduler(0) == getattr(os, before):
                os.sched_setscheduler(0, getattr(os, after), os.sched_param(0))
                return True
    return False


def count_gpus(environ: Mapping[str, str]) -> int:
    """Count the GPUs of NVIDIA (CUDA), AMD (ROCm) or Intel (XPU) that this process may use.

    Args:
        environ: The environment, such as ``os.environ``.
    """
    # SLURM sets all of these, whatever the GPUs are, and a user narrows one: the least counts.
    named = [_count_names(environ[name]) for name in _NARROWED_BY if name in environ]
    if named:
        return min(named)
    path = environ.get("PATH")
    if tool := shutil.which("nvidia-smi", path=path):
        found = sum(line.startswith("GPU") for line in _lines_of([tool, "-L"], environ))
        if found:  # else it, its driver or its GPUs are missing, and they may be of others
            return found
    has_driver = Path("/dev/kfd").exists() or any(Path("/dev/dri").glob("render*"))
    if not has_driver and not any(shutil.which(tool, path=path) for tool in _OTHER_TOOLS):
        return 0
    # torch takes seconds to import.
    last = next(reversed(_lines_of([sys.executable, "-c", _COUNT], environ)), "")
    return int(last) if last.isdigit() else 0


def _count_names(text: str) -> int:
    """Count the entries of a list such as ``0,GPU-1b``; ``-1`` and an empty list hide all."""
    return sum(bool(re.match("[0-9GM]", entry)) for entry in text.split(","))


def _lines_of(command: list[str], environ: Mapping[str, str]) -> list[str]:
    """Return what a command prints on stdout; nothing where it fails."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            command,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=scaled(120.0),
            check=False,
        )
        return done.stdout.splitlines()
    return []
