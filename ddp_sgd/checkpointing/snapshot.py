"""Snapshot of the state in host memory, page-locked where possible; training waits for the copy."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch

_Key = tuple[int, torch.dtype, torch.Size, tuple[int, ...]]


class Snapshot:
    """Host memory as large as the state, page-locked where the state is on an accelerator.

    Where no page-locked memory is to be had, pageable memory takes its place.

    Args:
        device: Where the state is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pin = device.type in ("cuda", "xpu")
        self._kept: dict[_Key, torch.Tensor] = {}
        self._before: dict[_Key, torch.Tensor] = {}
        self._copied: torch.Event | None = None

    def reserve(self, tree: Mapping[str, Any]) -> None:
        """Get hold of the memory beforehand, since its first use takes longer than the copy."""
        for tensor in filter(_has_memory, _tensors(tree)):
            if (key := _key(tensor)) not in self._kept:
                self._kept[key] = self._like(tensor).zero_()

    def take(self, tree: Mapping[str, Any]) -> Any:
        """Copy all tensors of a tree; the copy is whole after ``wait``.

        Tensors that are one and the same stay so. The copy is overwritten by the next one.

        Args:
            tree: Mappings and lists of tensors and plain data, nested.

        Returns:
            The same tree over the kept memory.
        """
        self._before, self._kept = self._kept, {}
        copy = self._copy(tree)
        self._before = {}
        if self._device.type != "cpu":
            self._copied = torch.Event(self._device)
            self._copied.record()
        return copy

    def wait(self) -> None:
        """Wait until an accelerator has filled the last copy."""
        if self._copied is not None:
            self._copied.synchronize()

    def _copy(self, tree: Any) -> Any:
        if isinstance(tree, Mapping):
            return {key: self._copy(value) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            copies = [self._copy(value) for value in tree]
            return copies if isinstance(tree, list) else tuple(copies)
        if not isinstance(tree, torch.Tensor):
            return tree
        if not _has_memory(tree):
            return tree.detach().cpu().clone()
        key = _key(tree)
        if key not in self._kept:
            host = self._before.get(key)
            host = self._like(tree) if host is None else host
            self._kept[key] = host.copy_(tree.detach(), non_blocking=True)
        return self._kept[key]

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._pin:
            try:
                return torch.empty_like(tensor.detach(), device="cpu", pin_memory=True)
            except RuntimeError:  # the system lets no more memory be locked: copies take longer
                self._pin = False
        return torch.empty_like(tensor.detach(), device="cpu")


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one piece of memory, other than a sparse one."""
    return tensor.layout is torch.strided and not tensor.is_quantized


def _key(tensor: torch.Tensor) -> _Key:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _tensors(value)
