"""Model inputs: how what a data set gives becomes the arguments of the model's forward."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ddp_sgd.losses import Spread


def choose_spread(model: nn.Module, inputs: Any, samples: int) -> Spread:
    """Choose how inputs reach a model, by the signature of its ``forward``.

    A mapping becomes keyword arguments, and a list or tuple positional ones, where ``forward``
    takes several arguments that these fit. A list of one entry per sample, as detection models
    take, is one argument.

    Args:
        model: The module.
        inputs: Inputs of a batch.
        samples: Number of samples in it.
    """
    if not isinstance(inputs, (Mapping, list, tuple)):
        return "whole"
    parameters = _parameters_of(model)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if isinstance(inputs, Mapping):
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
        fits = takes_any or set(inputs) <= {p.name for p in named}
        return "keywords" if fits and (len(named) > 1 or takes_any) else "whole"
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = [p for p in positional if p.default is p.empty]
    fits = len(required) <= len(inputs) and (takes_any or len(inputs) <= len(positional))
    several = takes_any or len(positional) > 1
    is_rows = len(required) <= 1 and not _are_columns(inputs, samples)
    return "positions" if fits and several and not is_rows else "whole"


def _parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """List what ``forward`` takes; a compiled model takes what the model below it does."""
    original = getattr(model, "_orig_mod", model)
    try:
        return list(inspect.signature(original.forward).parameters.values())
    except (TypeError, ValueError):  # a forward that is not written in Python
        return []


def _are_columns(inputs: list[Any] | tuple[Any, ...], samples: int) -> bool:
    """Whether each entry has a row for every sample, rather than each sample an entry."""
    return all(
        isinstance(each, torch.Tensor) and each.ndim > 0 and len(each) == samples for each in inputs
    )
