"""Lazy modules are materialized by one forward pass before anything is compared or restored."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ddp_sgd.data.loader import move
from ddp_sgd.engine.evaluation import evaluating
from ddp_sgd.engine.side_effects import undo_side_effects
from ddp_sgd.errors import ConfigError


def is_materialized(model: nn.Module) -> bool:
    """Whether all parameters and buffers have a shape."""
    return not _lazy_names(model)


def materialize(
    model: nn.Module, inputs: Any, call: Callable[[nn.Module, Any], Any], seed: int
) -> None:
    """Give lazy parameters their shapes and first values, which follow from the seed alone.

    Args:
        model: The model, on any device; only its lazy modules change.
        inputs: Inputs of a batch, on the host.
        call: Calls the model with such inputs.
        seed: Seed of the weights.

    Raises:
        ConfigError: The model fails, or leaves lazy modules out.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with undo_side_effects([model], [torch.default_generator]), evaluating(model):
        torch.manual_seed(seed)
        call(model, move(inputs, device))
    if names := _lazy_names(model):
        raise ConfigError(
            f"model.{names[0]} is not initialized by a forward pass in evaluation mode; run the "
            "model once before the training, or give that layer its sizes."
        )


def _lazy_names(model: nn.Module) -> list[str]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if is_lazy(tensor)]
