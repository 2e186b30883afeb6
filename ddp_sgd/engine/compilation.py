"""Compilation: ``torch.compile`` of a model in place, before the first step."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddp_sgd.data.loader import MicroBatch
from ddp_sgd.distributed.data_parallel import DataParallelModel
from ddp_sgd.engine.evaluation import evaluating
from ddp_sgd.engine.side_effects import undo_side_effects
from ddp_sgd.engine.step import backward
from ddp_sgd.errors import ConfigError, UserError
from ddp_sgd.losses import Objective
from ddp_sgd.text import first_line
from ddp_sgd.torch_errors import Use, refuse_out_of_memory
from ddp_sgd.tree import tensors_in

CACHE_NAME = "compiled"
"""Folder of compiled code in the run folder."""


class FixedBatch:
    """Calls a compiled model with batches of one size, and its own code with all others.

    Code is compiled for one size: compiling it again for the last batch of an epoch would take
    longer than it saves.

    Args:
        model: The model or its wrapper.
        size: Samples of the batches that are compiled for.
    """

    def __init__(self, model: nn.Module, size: int) -> None:
        self._model = model
        self._size = size

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        first = next(tensors_in((args, kwargs)), None)
        if first is None or (first.ndim and len(first) == self._size):
            return self._model(*args, **kwargs)
        with torch.compiler.set_stance("force_eager"):
            return self._model(*args, **kwargs)


def compile_model(
    model: nn.Module, mode: bool | str, *, deterministic: bool, cache: Path | None
) -> None:
    """Have a model compiled at its next calls, in place, so that its keys stay.

    Args:
        model: The model itself, not its wrapper.
        mode: True, or a mode of ``torch.compile``.
        deterministic: Let no kernel be chosen by its time.
        cache: Folder for compiled code, so that a run that goes on does not compile again; None, or
            where ``TORCHINDUCTOR_CACHE_DIR`` is set: what torch chooses.
    """
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.resolve()))
    if deterministic:
        model.compile(dynamic=False, options={"deterministic": True})
    else:
        model.compile(dynamic=False, mode=None if mode is True else mode)


def compile_now(
    wrapper: DataParallelModel,
    objective: Objective,
    batch: MicroBatch,
    modules: Sequence[nn.Module],
    generators: Sequence[torch.Generator],
    *,
    evaluates: bool,
) -> None:
    """Compile by one forward and backward pass, and one forward pass in evaluation, if there is.

    The state stays as it is. No gradient is reduced. Ranks do this before the run is watched for
    hangs, since it may take minutes.

    Args:
        wrapper: The model, for whose wrapper the compiler may divide its code.
        objective: What is minimized.
        batch: A batch of the size of most, on the device.
        modules: The model, and the modules of the loss.
        generators: Generators that passes draw from.
        evaluates: Whether the run evaluates the model.

    Raises:
        ConfigError: The model cannot be compiled.
    """

    def train() -> None:
        with wrapper.sync_gradients(when=False):
            loss = objective(objective.outputs(wrapper.forward, batch.inputs), batch.targets)
            backward(loss, torch.ones_like(loss))

    def score() -> None:
        with evaluating(wrapper.inner):
            objective(objective.outputs(wrapper.inner, batch.inputs), batch.targets)

    with undo_side_effects(modules, generators):
        _refuse_failure(train, Use.STEP)
        if evaluates:
            _refuse_failure(score, Use.EVALUATION)


def _refuse_failure(compile_pass: Callable[[], None], use: Use) -> None:
    try:
        compile_pass()
    except UserError:
        raise
    except Exception as error:  # torch's compiler, and those below it, have many
        refuse_out_of_memory(error, use)
        raise ConfigError(
            "compute.compile is set while the model, which works without, cannot be compiled, "
            f"{type(error).__name__}: {first_line(error)}; set compute.compile=false, or exclude "
            "that part by torch.compiler.disable."
        ) from error
