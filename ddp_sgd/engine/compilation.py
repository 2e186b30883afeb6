"""Compilation: ``torch.compile`` of a model in place, before the first step."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddp_sgd.config import ComputeConfig
from ddp_sgd.data.loader import MicroBatch
from ddp_sgd.engine.context import TrainContext
from ddp_sgd.engine.evaluation import evaluating
from ddp_sgd.engine.side_effects import undo_side_effects
from ddp_sgd.engine.units import backward
from ddp_sgd.errors import ConfigError, Use, UserError, refuse_out_of_memory
from ddp_sgd.text import first_line
from ddp_sgd.tree import tensors_in

_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"

CACHE_NAME = "compiled"
"""Folder of compiled code in the run folder."""


@contextmanager
def compiled(context: TrainContext, compute: ComputeConfig, cache: Path) -> Iterator[None]:
    """Let a model run compiled code in the block, if ``compute.compile`` asks for it.

    It is compiled now, in training mode, and in evaluation mode where the run evaluates.
    Compilation takes a forward and a backward pass without a reduction, and a forward pass for
    evaluation; the state stays as it is. It may take minutes: so it is done before the run is
    watched for hangs.

    Args:
        context: The run.
        compute: Section ``compute`` of the configuration.
        cache: Folder for compiled code, so that a run that goes on does not compile again. Where
            ``TORCHINDUCTOR_CACHE_DIR`` is set, that is used.

    Raises:
        ConfigError: The model cannot be compiled.
    """
    batch = _largest_batch(context) if compute.compile else None
    if batch is None:  # or the run is at its end
        yield
        return
    model, objective, wrapper = context.wrapper.inner, context.objective, context.wrapper

    def call(forward: nn.Module) -> Any:
        return objective.outputs(forward, batch.inputs, batch.targets)

    def train() -> None:
        with wrapper.sync_gradients(when=False):
            loss = objective(call(wrapper.forward), batch.targets)
            backward(loss, torch.ones_like(loss))

    def score() -> None:
        with evaluating(model):
            call(model)

    is_ours = _CACHE_VARIABLE not in os.environ
    os.environ.setdefault(_CACHE_VARIABLE, str(cache.resolve()))
    compile_model(model, compute, batch.samples)
    try:
        modules = [model, *context.loss_modules.values()]
        with undo_side_effects(modules, context.randomness.generators):
            _refuse_failure(train, Use.STEP)
            if context.evaluates:
                _refuse_failure(score, Use.EVALUATION)
        yield
    finally:
        model._compiled_call_impl = None
        if is_ours:
            del os.environ[_CACHE_VARIABLE]


def _largest_batch(context: TrainContext) -> MicroBatch | None:
    """Read the largest micro-batch of the next steps, as the model gets it: most are as large."""
    largest: MicroBatch | None = None
    for step in context.peek():
        for batch in step.micro_batches:
            if largest is None or batch.samples > largest.samples:
                ready = batch.to(context.runtime.device)
                inputs = step.transforms(ready.inputs, ready.indices, ready.epoch)
                largest = ready._replace(inputs=inputs)
    return largest


def compile_model(model: nn.Module, compute: ComputeConfig, size: int) -> None:
    """Compile a model in place, so that its keys stay, for batches of one size.

    Compiling it again for the last batch of an epoch would take longer than it saves: batches of
    another size run the code of the model itself.

    Args:
        model: The model itself, not its wrapper.
        compute: Section ``compute`` of the configuration.
        size: Samples of the batches to compile for.
    """
    mode = compute.compile if isinstance(compute.compile, str) else None
    options = {"deterministic": True} if compute.deterministic else None  # none chosen by its time
    nn.Module.compile(model, dynamic=False, mode=mode, options=options)  # it may have its own
    code: Any = model._compiled_call_impl

    def call(*args: Any, **kwargs: Any) -> Any:
        first = next(tensors_in((args, kwargs)), None)
        is_of_size = first is None or (first.ndim > 0 and len(first) == size)
        return (code if is_of_size else model._call_impl)(*args, **kwargs)

    model._compiled_call_impl = call


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
