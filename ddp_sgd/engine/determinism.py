"""Determinism: torch's deterministic algorithms, and a notice for each operation without one."""

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._C import _set_deterministic_algorithms
from torch.backends import cudnn
from torch.utils import deterministic

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_WARNING = r"(?s).*determinis"
"""Beginning of what torch warns about operations that are not deterministic."""


@contextmanager
def deterministic_algorithms(
    device: torch.device, notice: Callable[[str], None], *, enabled: bool
) -> Iterator[None]:
    """Let torch compute the same bits run after run, or as fast as it can; as before at the end.

    On the CPU as well: on several threads the backward pass of ``x[indices]`` adds up in the order
    in which they come, unless torch is told not to (measured with torch 2.14; the deterministic
    kernel took half the time). Without that it changes no kernel there.

    Args:
        device: Where the model computes.
        notice: Receives one line for each operation that has no deterministic implementation,
            where torch warns.
        enabled: False lets cuDNN time its kernels and take the fastest; nothing else changes.
    """
    before = cudnn.deterministic, cudnn.benchmark
    if not enabled:
        cudnn.benchmark = True
        try:
            yield
        finally:
            cudnn.benchmark = before[1]
        return
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with _cublas_workspace(device), _deterministic_kernels(), _warnings_as(notice):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _cublas_workspace(device: torch.device) -> Iterator[None]:
    """Give each stream of cuBLAS memory of its own, as NVIDIA's documentation asks for."""
    is_ours = device.type == "cuda" and _WORKSPACE not in os.environ
    if is_ours:
        os.environ[_WORKSPACE] = ":4096:8"
    try:
        yield
    finally:
        if is_ours:
            os.environ.pop(_WORKSPACE, None)


@contextmanager
def _deterministic_kernels() -> Iterator[None]:
    # The public function imports torch's compiler, which takes seconds.
    choose: Any = _set_deterministic_algorithms
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = deterministic
    filled = memory.fill_uninitialized_memory
    if not before:  # a user may have chosen errors in place of warnings
        choose(True, warn_only=True)  # noqa: FBT003
    memory.fill_uninitialized_memory = False  # memory that is written before it is read
    try:
        yield
    finally:
        choose(before, warn_only=only_warned)
        memory.fill_uninitialized_memory = filled


@contextmanager
def _warnings_as(notice: Callable[[str], None]) -> Iterator[None]:
    """Turn torch's warnings about operations that are not deterministic into notices, each once."""
    seen: set[str] = set()
    show = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *rest: Any, **named: Any) -> None:
        if not re.match(_WARNING, str(message), re.IGNORECASE):
            show(message, category, *rest, **named)
            return
        line = _shortened(str(message))
        if line not in seen:
            seen.add(line)
            notice(line)

    warnings.filterwarnings("always", message=_WARNING, category=UserWarning)
    ours = warnings.filters[0]
    warnings.showwarning = note
    try:
        yield
    finally:
        if warnings.showwarning is note:  # else someone replaced it, and will put it back
            warnings.showwarning = show
        if ours in warnings.filters:
            warnings.filters.remove(ours)  # type: ignore[attr-defined]


def _shortened(message: str) -> str:
    """Name the operation; the rest of what torch writes is about reporting it to torch."""
    operation, found, _ = message.partition(" does not have a deterministic implementation")
    if found:
        return (
            f"compute.deterministic is true, but {operation} has no deterministic implementation: "
            "bits may differ from run to run"
        )
    return f"compute.deterministic is true, but torch warns: {message.strip().splitlines()[0]}"
