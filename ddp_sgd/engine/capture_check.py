"""Check of a captured step: replays give what eager steps give, and nothing stays on the host."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ddp_sgd.engine.buffers import buffers_by_name
from ddp_sgd.engine.side_effects import SideEffects

_NOISE = 4.0
"""How many times farther from an eager step a replay may be than another eager step is, where
kernels are not deterministic."""

Tensors = dict[str, torch.Tensor]


class Moved(NamedTuple):
    """What a step moves.

    Args:
        modules: The model, and the modules of the loss.
        generators: Generators that a step draws from.
        others: Tensors besides parameters and buffers by name, such as momentum buffers; they are
            written in place.
    """

    modules: Sequence[nn.Module]
    generators: Sequence[torch.Generator]
    others: Mapping[str, torch.Tensor]

    def tensors(self) -> Tensors:
        """Return the tensors that a step moves by name, where they are now."""
        roots = {str(number): module for number, module in enumerate(self.modules)}
        tensors = dict(self.others)
        for where, root in roots.items():
            tensors |= {f"parameter {where}.{n}": p.detach() for n, p in root.named_parameters()}
        for name, (module, key) in buffers_by_name(roots).items():
            if (buffer := module._buffers[key]) is not None:
                tensors[f"buffer {name}"] = buffer
        return tensors

    def pointers(self) -> list[int]:
        """Return where the memory of each tensor is."""
        return [tensor.data_ptr() for tensor in self.tensors().values()]


def find_problem(
    moved: Moved,
    seed: Callable[[], None],
    take_eagerly: Callable[[], torch.Tensor],
    capture: Callable[[], None],
    replay: Callable[[], torch.Tensor],
) -> str:
    """Take a step twice eagerly and once by replay, from one state, and put the state back.

    Args:
        moved: What the step moves.
        seed: Seeds all generators for the step.
        take_eagerly: Takes the step; returns losses and norm.
        capture: Captures the step; does nothing if it is captured.
        replay: Takes the step by replay; returns losses and norm.

    Returns:
        What is wrong, after "the step ..."; empty if nothing is.
    """
    effects = SideEffects(moved.modules, moved.generators)
    others = {name: tensor.clone() for name, tensor in moved.others.items()}

    def put_back(*, attributes: bool = False) -> None:
        effects.undo(attributes=attributes)
        for name, tensor in moved.others.items():
            tensor.copy_(others[name])

    try:
        seed()
        first = _copies(moved, take_eagerly())
        put_back()
        effects.keep_attributes()  # the first pass may have filled caches
        seed()
        before = random.getstate(), _numpy_state()
        again = _copies(moved, take_eagerly())
        if before != (random.getstate(), _numpy_state()):
            return "draws from random or numpy.random, which a graph repeats; draw by torch"
        if names := effects.changed_attributes():
            return (
                f"sets {names[0]}, which stays on the host; use a buffer that is written in place"
            )
        put_back()
        capture()
        put_back(attributes=True)
        seed()
        return _difference(first, again, _copies(moved, replay()))
    finally:
        put_back(attributes=True)


def _copies(moved: Moved, numbers: torch.Tensor) -> Tensors:
    """Copy all that a step moves, and what it leaves behind."""
    return {name: t.clone() for name, t in {"loss or norm": numbers, **moved.tensors()}.items()}


def _numpy_state() -> tuple[int, bytes]:
    state: Any = np.random.get_state(legacy=False)  # of the global generator, which models use
    return state["state"]["pos"], state["state"]["key"].tobytes()


def _difference(
    first: dict[str, torch.Tensor],
    again: dict[str, torch.Tensor],
    replayed: dict[str, torch.Tensor],
) -> str:
    """Describe how a replay differs from eager steps; empty if it does not, beyond their noise."""
    noise = max(_distance(first[name], again[name]) for name in first)
    if math.isinf(noise):
        return "gives tensors of other shapes, or other values that are not finite, each time"
    for name, tensor in first.items():
        distance = _distance(tensor, replayed[name])
        if distance > _NOISE * noise:
            return (
                f"is not repeated by its graph ({name} differs by {distance:.1e} of its largest "
                "number): a replay calls no Python, and reads memory that was there at the capture"
            )
    return ""


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest number; 0 for equal ones, with NaN."""
    if one.shape != other.shape:
        return math.inf
    is_equal = (one == other) | (one.isnan() & other.isnan())
    if bool(is_equal.all()):
        return 0.0
    largest = float(one.double().abs().nan_to_num().max())
    distance = float((one.double() - other.double()).abs().max()) / (largest or 1.0)
    return math.inf if math.isnan(distance) else distance
