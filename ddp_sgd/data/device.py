"""Prefetching to the device: page-locked buffers, and copies on a stream of their own.

The next batch is read and copied while the device computes. The training thread reads, since
samples draw from generators of the whole process.
"""

import ctypes
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ddp_sgd.data.placement import ArrayPair, Rows, is_plain
from ddp_sgd.tree import map_leaves

T = TypeVar("T")
Place = Callable[[Any], Any]
"""Copies the tensors of a tree, such as the inputs of a micro-batch, to the device."""

_HOST_SETS = 4
"""Steps whose page-locked buffers exist at once: so far the host may run ahead of the copies."""

_DEVICE_SETS = 2
"""Steps whose device buffers exist at once: one is computed on while the next one is filled."""


class Transfer:
    """Streams, events and page-locked memory of a device: all that prefetching needs of it.

    Copies are done in the order of the calls, on a stream of their own. The compute stream is the
    one that is current.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pin = True

    def pinned(self, num_bytes: int) -> torch.Tensor:
        """Allocate host memory that the device can read while the host goes on.

        Where no more memory can be page-locked it is pageable, and copies take longer.
        """
        if self._pin:
            try:
                return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                self._pin = False
        return torch.empty(num_bytes, dtype=torch.uint8)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Whether the device can read a tensor on the host while the host goes on."""
        return tensor.is_pinned()

    def empty(self, num_bytes: int) -> torch.Tensor:
        """Allocate memory of the device, for the compute stream."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def event(self) -> Any:
        """Make an event that was not recorded, for which nothing waits."""
        return torch.cuda.Event()  # type: ignore[no-untyped-call]

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a tensor to the device, after the copies before."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def move(self, leaf: Any) -> Any:
        """Move what is no ordinary tensor, such as a packed sequence, on the compute stream."""
        return move(pin(leaf), self.device)

    def record_copies(self, event: Any) -> None:
        """Mark where the copies are now."""
        event.record(self._copies)

    def record_compute(self, event: Any) -> None:
        """Mark where the compute stream is now."""
        event.record(torch.cuda.current_stream(self.device))

    def copies_wait(self, event: Any) -> None:
        """Let the copies that come wait for the last mark of an event; the host does not wait."""
        self._copies.wait_event(event)

    def compute_waits(self, event: Any) -> None:
        """Let the compute stream wait for the last mark of an event; the host does not wait."""
        torch.cuda.current_stream(self.device).wait_event(event)

    def has_failed(self) -> bool:
        """Whether the device does nothing any more."""
        try:
            torch.cuda.current_stream(self.device).query()
        except RuntimeError:
            return True
        return False

    def host_waits(self, event: Any) -> None:
        """Let the host wait for the last mark of an event, if the device has not passed it."""
        if not event.query():
            event.synchronize()


def open_transfer(device: torch.device) -> Transfer | None:
    """Return what copies batches to a device; None where they are copied directly."""
    return Transfer(device) if device.type == "cuda" else None


class _Buffer:
    """Memory for tensors of changing shapes, one at a time; it grows and never shrinks."""

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self.memory: torch.Tensor | None = None
        self._view: torch.Tensor | None = None

    def view(
        self, shape: Sequence[int], stride: Sequence[int] | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return a tensor on this memory; the one before is overwritten with it.

        Args:
            shape: Its shape.
            stride: Its strides, of a tensor without gaps; None: contiguous.
            dtype: Its number type.
        """
        last = self._view
        if last is not None and (last.dtype, last.shape) == (dtype, shape):
            is_alike = stride is None or stride == last.stride()
            if is_alike:
                return last
        num_bytes = math.prod(shape) * dtype.itemsize
        if self.memory is None or self.memory.nbytes < num_bytes:
            spare = 0 if self.memory is None else num_bytes // 4  # shapes vary: it may grow again
            self.memory = self._view = None  # what is freed first may be given out again
            self.memory = self._allocate(num_bytes + spare)
        flat = self.memory[:num_bytes].view(dtype)
        self._view = flat.view(shape) if stride is None else flat.as_strided(shape, stride)
        return self._view


class _BufferSet:
    """The buffers of one step, in the order of its tensors, and when they may be written again.

    Args:
        allocate: Gives memory of a size in bytes.
        free: Event after which nobody reads the buffers.
    """

    def __init__(self, allocate: Callable[[int], torch.Tensor], free: Any) -> None:
        self.free = free
        self.sources: list[torch.Tensor] = []  # tensors that are copied from where they are
        self._allocate = allocate
        self._buffers: list[_Buffer] = []
        self._used = 0

    def begin(self) -> None:
        """Begin with the first buffer again."""
        self.sources.clear()
        self._used = 0

    def all_tensors(self) -> list[torch.Tensor]:
        """List the memory of all buffers, and the tensors that are copied from where they are."""
        memories = [buffer.memory for buffer in self._buffers]
        return [*self.sources, *(each for each in memories if each is not None)]

    def next(self) -> _Buffer:
        """Return the buffer of the next tensor."""
        if self._used == len(self._buffers):
            self._buffers.append(_Buffer(self._allocate))
        self._used += 1
        return self._buffers[self._used - 1]


class _Ahead(NamedTuple):
    """What was read ahead: an item, an error that waits for its turn, or the end of the items."""

    item: Any = None
    error: Exception | None = None
    is_end: bool = False


class Prefetcher:
    """Reads items and copies them to the device, the next one while the device computes.

    An item is what is computed on before the next one is asked for, such as the micro-batches of a
    step. Its tensors go through a ring of page-locked buffers to one of two sets of device buffers,
    on a stream of their own. The compute stream waits for the copy; device buffers are filled again
    after what was launched on them, page-locked ones after their copy. So the tensors of an item
    keep their values until the item after the next one is read. Once the buffers are as large as
    the batches nothing is allocated, and the host waits only if it is a whole ring ahead.

    Args:
        transfer: The device.
    """

    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._host = [_BufferSet(transfer.pinned, transfer.event()) for _ in range(_HOST_SETS)]
        self._device = [_BufferSet(self._allocate, transfer.event()) for _ in range(_DEVICE_SETS)]
        self._turn = 0
        self._read: Callable[[], Any] | None = None
        self._ahead: _Ahead | None = None
        self._in_use: _BufferSet | None = None

    def run(self, items: Iterable[T], apply: Callable[[T, Place], T]) -> Iterator[T]:
        """Yield items on the device, in order; one that is read ahead and not used is dropped.

        Args:
            items: Items on the host, which are read one at a time.
            apply: Gives an item with its trees replaced by what a function makes of them.

        Raises:
            Exception: The one of an item that cannot be read, where that item is asked for.
        """
        iterator = iter(items)
        self._read = lambda: self._copy(next(iterator), apply)
        try:
            while True:
                self.read_ahead()
                ahead, self._ahead = self._ahead, None
                if ahead is None or ahead.is_end:
                    return
                if ahead.error is not None:
                    raise ahead.error
                self._in_use = self._device[(self._turn - 1) % _DEVICE_SETS]
                self._wait_for_copies()
                yield ahead.item
        finally:
            with suppress(RuntimeError):  # of a device that failed, which the step reports
                self._wait_for_copies()  # buffers may be freed, and copies not be over
            self._read = self._ahead = None
            if self._transfer.has_failed():
                self._keep_for_ever()

    def read_ahead(self) -> None:
        """Read the next item now, once the compute on the last one was launched.

        Its error waits until it is asked for. Outside of ``run`` there is nothing to read.
        """
        if self._read is None or self._ahead is not None:
            return
        self._release()
        try:
            self._ahead = _Ahead(self._read())
        except StopIteration:
            self._ahead = _Ahead(is_end=True)
        except Exception as error:  # the step before it may not be over, or saved
            self._ahead = _Ahead(error=error)

    def _copy(self, item: T, apply: Callable[[T, Place], T]) -> T:
        host = self._host[self._turn % _HOST_SETS]
        device = self._device[self._turn % _DEVICE_SETS]
        self._turn += 1
        self._transfer.host_waits(host.free)
        self._transfer.copies_wait(device.free)
        host.begin()
        device.begin()
        place = partial(self._place, host, device)
        try:
            return apply(item, lambda tree: for_movable(tree, place))
        finally:
            self._transfer.record_copies(host.free)

    def _place(self, host: _BufferSet, device: _BufferSet, leaf: Any) -> Any:
        """Copy a leaf by the buffers; what is no ordinary tensor goes on the compute stream."""
        if isinstance(leaf, Rows) and leaf.indices is not None:
            shape = (len(leaf.indices), *leaf.array.shape[1:])
            source = host.next().view(shape, None, leaf.array.dtype)
            torch.index_select(leaf.array, 0, leaf.indices, out=source)
            target = device.next().view(shape, None, source.dtype)
            self._transfer.copy(target, source)
            return Rows(target, None, leaf.convert) if leaf.convert else target
        if not is_plain(leaf) or leaf.device.type != "cpu":
            return self._transfer.move(leaf)
        stride = _stride_of_images(leaf)
        source = leaf
        if self._transfer.is_pinned(leaf):
            host.sources.append(leaf)  # whose memory is free again once it is copied
        else:
            source = host.next().view(leaf.shape, stride, leaf.dtype).copy_(leaf)
        target = device.next().view(leaf.shape, stride, leaf.dtype)
        self._transfer.copy(target, source)
        return target

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        """Allocate device memory; what the compute stream did in it before ends before a copy."""
        memory, allocated = self._transfer.empty(num_bytes), self._transfer.event()
        self._transfer.record_compute(allocated)
        self._transfer.copies_wait(allocated)
        return memory

    def _keep_for_ever(self) -> None:
        """Never free page-locked memory: after a failure of the device that aborts the process."""
        for buffers in self._host:
            for tensor in buffers.all_tensors():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor))

    def _release(self) -> None:
        """Mark the end of what was launched on the item in use."""
        if self._in_use is not None:
            self._transfer.record_compute(self._in_use.free)
            self._in_use = None

    def _wait_for_copies(self) -> None:
        self._transfer.compute_waits(self._host[(self._turn - 1) % _HOST_SETS].free)


def _stride_of_images(tensor: torch.Tensor) -> Sequence[int] | None:
    """Return the strides of images whose channels come last; None for other tensors."""
    if not tensor.is_contiguous() and tensor.ndim in (4, 5):
        last = torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d
        if tensor.is_contiguous(memory_format=last):
            return tensor.stride()
    return None


def prefetch_rows(
    arrays: ArrayPair, blocks: Iterable[Sequence[NDArray[np.int64]]], transfer: Transfer
) -> Iterator[tuple[Any, Any]]:
    """Yield batches of arrays on the device; the indices of a block are copied at once.

    Args:
        arrays: Arrays on the device.
        blocks: Indices of batches; what is computed on a block is launched before the next one is
            read.
        transfer: The device.
    """

    def copy_indices(block: Any, place: Place) -> Any:
        indices = place(torch.from_numpy(np.concatenate(block)))
        return indices.split([len(each) for each in block])

    copied: Iterator[Any] = Prefetcher(transfer).run(blocks, copy_indices)
    for block in copied:
        for indices in block:
            yield arrays.rows(indices)


def move(value: Any, device: torch.device) -> Any:
    """Put tensors, also those in lists, tuples and mappings, on a device.

    So are objects with a method ``to``, such as packed sequences and the batches of tokenizers.
    """

    def change(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            return each.to(device, non_blocking=True)
        return each.to(device)

    return for_movable(value, change)


def pin(each: Any) -> Any:
    """Lock the memory of dense tensors on the host, and of objects that can do so by themselves."""
    if isinstance(each, torch.Tensor):
        is_pinnable = each.device.type == "cpu" and each.layout is torch.strided
    else:  # such as packed sequences, whose tensors may be on a device
        is_pinnable = hasattr(each, "pin_memory") and not getattr(each, "is_cuda", False)
    return each.pin_memory() if is_pinnable else each


def for_movable(value: Any, change: Callable[[Any], Any]) -> Any:
    """Replace tensors, and objects with a method ``to``, in a tree; other leaves stay."""

    def change_movable(each: Any) -> Any:
        return change(each) if hasattr(each, "to") else each

    # A packed sequence is a tuple with lengths for the host, and has the method itself.
    return map_leaves(change_movable, value, is_leaf=lambda each: hasattr(each, "to"))
