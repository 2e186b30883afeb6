"""This host: CPUs, GPUs, scheduling policy, memory, addresses, and timeouts on it. No torch.

The factor of ``DDP_SGD_TIMEOUT_FACTOR`` raises timeouts that are fixed in the code, for hosts that
are busy. Those of the configuration (``runtime.timeout_s``, ``runtime.hang_s``) are the user's, and
are not multiplied.
"""

import ctypes
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path

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
    """Count the GPUs of NVIDIA (CUDA), AMD (ROCm) or Intel (XPU) that this process may use."""
    # SLURM sets all of these for GPUs of any vendor, and a user narrows one: the least counts.
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


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of mallopt(3)."""


def keep_freed_memory() -> None:
    """Have glibc keep the memory of one step for the next, instead of giving it back to the system.

    On the CPU a step frees its activations, and the next one allocates them again: given back, each
    of their pages is mapped and cleared again. ResNet-18 on 32 images then meets 20 to 30 thousand
    page faults more in a step of 0.6 s, a tenth of its time. A choice of the user's stays.

    Source:
        mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    is_chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if sys.platform == "linux" and not is_chosen:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries lack it
        if mallopt is not None:
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_M_MMAP_THRESHOLD, 2**30)


def whereabouts(address: str) -> str:
    """Return where a name or address leads from here.

    Args:
        address: Name, IPv4 or IPv6 address of a host.

    Returns:
        ``loopback`` if back to the machine that looks it up, on each; ``here`` if to this machine;
        ``elsewhere``; or ``unknown`` if this machine does not know the name.
    """
    try:
        places = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)
    except OSError:
        return "unknown"
    if all(ip_address(str(place[4][0]).partition("%")[0]).is_loopback for place in places):
        return "loopback"
    for family, kind, protocol, _, place in places:
        with suppress(OSError), socket.socket(family, kind, protocol) as listener:
            listener.bind(place)  # to an own address only
            return "here"
    return "elsewhere"


def free_port() -> int:
    """Find a TCP port that is free at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


FACTOR = "DDP_SGD_TIMEOUT_FACTOR"
"""Environment variable that holds the factor, a number in [1, 1000]; 1 where it is not set."""

_MOST = 1000.0


def scaled(seconds: float) -> float:
    """Return a fixed timeout, multiplied by the factor of the environment.

    Args:
        seconds: Timeout on a machine that is not overloaded, in seconds.
    """
    return seconds * (timeout_factor(os.environ) or 1.0)


def timeout_factor(environ: Mapping[str, str]) -> float | None:
    """Return the factor that an environment sets.

    Returns:
        A number in [1, 1000]; None where the variable holds something else.
    """
    try:
        factor = float(environ.get(FACTOR) or "1")
    except ValueError:
        return None
    return factor if 1.0 <= factor <= _MOST else None
