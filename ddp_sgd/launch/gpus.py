"""The number of GPUs that this process may use, found without importing torch where possible."""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
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


def count_gpus(environ: Mapping[str, str]) -> int:
    """Count the GPUs of NVIDIA (CUDA), AMD (ROCm) or Intel (XPU) that this process may use.

    Args:
        environ: The environment, such as ``os.environ``.
    """
    # SLURM sets all of these, whatever the GPUs are, and a user narrows one: the least counts.
    named = [_count_names(environ[name]) for name in _NARROWED_BY if name in environ]
    if named:
        return min(named)
    return _count_by_tool(environ) or _count_by_torch(environ)


def _count_names(text: str) -> int:
    """Count the entries of a list such as ``0,GPU-1b``; ``-1`` and an empty list hide all."""
    return sum(bool(re.match("[0-9GM]", entry)) for entry in text.split(","))


def _count_by_tool(environ: Mapping[str, str]) -> int:
    """Ask nvidia-smi; 0 where it, its driver or its GPUs are missing: they may be of others."""
    tool = shutil.which("nvidia-smi", path=environ.get("PATH"))
    lines = _lines_of([tool, "-L"], environ) if tool else []
    return sum(line.startswith("GPU") for line in lines)


def _count_by_torch(environ: Mapping[str, str]) -> int:
    """Ask torch, which takes seconds to import, where there is a driver or a tool of others."""
    path = environ.get("PATH")
    has_driver = Path("/dev/kfd").exists() or any(Path("/dev/dri").glob("render*"))
    if not has_driver and not any(shutil.which(tool, path=path) for tool in _OTHER_TOOLS):
        return 0
    last = next(reversed(_lines_of([sys.executable, "-c", _COUNT], environ)), "")
    return int(last) if last.isdigit() else 0


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
