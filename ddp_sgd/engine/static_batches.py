"""Static batches: device memory from which a captured step reads its micro-batches."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ddp_sgd.data.loader import MicroBatch, StepBatches
from ddp_sgd.data.placement import Rows
from ddp_sgd.errors import ConfigError
from ddp_sgd.tree import leaves, map_leaves

GRAPHS_ARE_ON = "compute.cuda_graphs is true while"
LEAVE_OUT = "or set compute.cuda_graphs=false"


class StaticBatches:
    """Micro-batches of a full step in memory that stays where it is.

    Rows of arrays on the device stay rows: then only their indices are copied, and the graph
    gathers.

    Args:
        first: Batches of a full step.
        device: Where the memory is.

    Attributes:
        batches: The micro-batches, on the device.
    """

    def __init__(self, first: StepBatches, device: torch.device) -> None:
        self._memory: dict[int, torch.Tensor] = {}
        self._device = device
        self._transforms = len(first.transforms) > 0
        self._epoch = torch.zeros((), dtype=torch.int64, device=device)
        self._epoch_on_device = -1
        first = first._replace(
            micro_batches=tuple(b._replace(indices=_indices_of(b)) for b in first.micro_batches)
        )
        sources = self._sources(first)
        positions = {id(source): number for number, source in enumerate(sources)}
        self._chosen = sorted(positions.values())  # inputs and targets may have the same indices
        self._form = self._form_of(first, sources)
        self.batches = first._replace(micro_batches=tuple(map(self._keep, first.micro_batches)))
        self._tensors = [self._memory[id(sources[number])] for number in self._chosen]

    def fill(self, batches: StepBatches) -> bool:
        """Copy the micro-batches of a step; nothing waits for the device.

        Returns:
            Whether they fit: equal numbers of samples, and tensors of the same shapes. Otherwise
            nothing is copied.
        """
        sources = self._sources(batches)
        if self._form_of(batches, sources) != self._form:
            return False
        torch._foreach_copy_(self._tensors, [sources[number] for number in self._chosen])
        epoch = batches.micro_batches[0].epoch
        if self._transforms and epoch != self._epoch_on_device:
            self._epoch.fill_(epoch)
            self._epoch_on_device = int(epoch)
        return True

    def _keep(self, batch: MicroBatch) -> MicroBatch:
        kept = batch._replace(
            inputs=map_leaves(self._keep_leaf, batch.inputs),
            targets=map_leaves(self._keep_leaf, batch.targets),
        )
        if not self._transforms:
            return kept
        return kept._replace(epoch=self._epoch, indices=self._keep_tensor(_indices_of(batch)))

    def _keep_leaf(self, leaf: Any) -> Any:
        if leaf is None:
            return None
        if not isinstance(leaf, Rows):
            return self._keep_tensor(leaf)
        if leaf.indices is None:
            return replace(leaf, array=self._keep_tensor(leaf.array))
        return replace(leaf, indices=self._keep_tensor(leaf.indices))

    def _keep_tensor(self, source: torch.Tensor) -> torch.Tensor:
        if id(source) not in self._memory:
            self._memory[id(source)] = torch.empty_like(source, device=self._device).copy_(source)
        return self._memory[id(source)]

    def _sources(self, batches: StepBatches) -> list[torch.Tensor]:
        """List the tensors of a step that are copied."""
        found: list[torch.Tensor] = []
        for batch in batches.micro_batches:
            for part in (batch.inputs, batch.targets):
                if type(part) is Rows or type(part) is torch.Tensor:  # soonest: this is every step
                    found.append(_tensor_of(part))
                elif part is not None:  # there may be no targets
                    found += [_tensor_of(leaf) for _, leaf in leaves(part)]
        if self._transforms:
            found += [_indices_of(batch) for batch in batches.micro_batches]
        return found

    @staticmethod
    def _form_of(batches: StepBatches, sources: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        sizes = [each.samples for each in batches.micro_batches]
        shapes = [each.shape for each in sources]
        return batches.samples, sizes, shapes, [each.dtype for each in sources]


def _tensor_of(leaf: Any) -> torch.Tensor:
    if isinstance(leaf, Rows):
        return leaf.array if leaf.indices is None else leaf.indices
    if not isinstance(leaf, torch.Tensor) or leaf.layout is not torch.strided:
        raise ConfigError(
            f"{GRAPHS_ARE_ON} a batch holds a {type(leaf).__name__}; let data.train give tensors, "
            f"in containers of Python's own, {LEAVE_OUT}."
        )
    return leaf


def _indices_of(batch: MicroBatch) -> torch.Tensor:
    indices = batch.indices
    return indices if isinstance(indices, torch.Tensor) else torch.from_numpy(indices)


def copy_batch(batch: MicroBatch) -> MicroBatch:
    """Copy a micro-batch, since a loader fills its memory again."""
    copies: dict[int, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        return copies.setdefault(id(tensor), tensor.clone())

    def copy_leaf(leaf: Any) -> Any:
        if not isinstance(leaf, Rows):
            return copy(leaf) if isinstance(leaf, torch.Tensor) else leaf
        if leaf.indices is None:
            return replace(leaf, array=copy(leaf.array))
        return replace(leaf, indices=copy(leaf.indices))

    indices = batch.indices
    return batch._replace(
        inputs=map_leaves(copy_leaf, batch.inputs),
        targets=map_leaves(copy_leaf, batch.targets),
        indices=copy(indices) if isinstance(indices, torch.Tensor) else indices,
    )
