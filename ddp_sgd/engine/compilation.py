"""Compilation: ``torch.compile`` of a model in place, before the first step."""

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddp_sgd.config import ComputeConfig
from ddp_sgd.data.loader import MicroBatch
from ddp_sgd.engine.context import TrainContext
from ddp_sgd.engine.evaluation import evaluating
from ddp_sgd.engine.side_effects import undo_side_effects
from ddp_sgd.engine.step import backward
from ddp_sgd.errors import ConfigError, Use, UserError, refuse_out_of_memory
from ddp_sgd.text import first_line
from ddp_sgd.tree import tensors_in

CACHE_NAME = "compiled"
"""Folder of compiled code in the run folder."""


@contextmanager
def compiled(context: TrainContext, compute: ComputeConfig, cache: Path) -> Iterator[None]:
    """Let a model run compiled code in the block, which is compiled now, for both its modes.

    Compilation takes a forward and a backward pass without a reduction, and a forward pass in
    evaluation mode; the state stays as it is. It may take minutes: so it is done before the run is
    watched for hangs.

    Args:
        context: The run.
        compute: Section ``compute`` of the configuration.
        cache: Folder for compiled code, so that a run that goes on does not compile again. Where
            ``TORCHINDUCTOR_CACHE_DIR`` is set, that is used.

    Raises:
        ConfigError: The model cannot be compiled.
    """
    model, objective, wrapper = context.wrapper.inner, context.objective, context.wrapper
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.resolve()))
    begun: Any = context.loader.from_step(context.state.step)
    with closing(begun) as steps:
        batch: MicroBatch = next(iter(steps)).micro_batches[0].to(context.runtime.device)

    def train() -> None:
        with wrapper.sync_gradients(when=False):
            loss = objective(objective.outputs(wrapper.forward, batch.inputs), batch.targets)
            backward(loss, torch.ones_like(loss))

    def score() -> None:
        with evaluating(model):
            objective(objective.outputs(model, batch.inputs), batch.targets)

    compile_model(model, compute, batch.samples)
    try:
        modules = [model, *context.loss_modules.values()]
        with undo_side_effects(modules, context.randomness.generators):
            _refuse_failure(train, Use.STEP)
            _refuse_failure(score, Use.EVALUATION)
        yield
    finally:
        model._compiled_call_impl = None


def compile_model(model: nn.Module, compute: ComputeConfig, size: int) -> None:
    """Compile a model in place, so that its keys stay, for batches of one size.

    Compiling it again for the last batch of an epoch would take longer than it saves: batches of
    another size run the code of the model itself.

    Args:
        model: The model itself, not its wrapper.
        compute: Section ``compute`` of the configuration.
        size: Samples of the batches to compile for.
    """
    if compute.deterministic:  # no kernel is chosen by its time
        model.compile(dynamic=False, options={"deterministic": True})
    else:
        model.compile(
            dynamic=False, mode=compute.compile if isinstance(compute.compile, str) else None
        )
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
