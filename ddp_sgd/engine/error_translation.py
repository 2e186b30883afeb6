"""Translation of torch's errors in the middle of a run into the terms of the configuration."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddp_sgd.checkpointing.manifest import SkippedSteps
from ddp_sgd.data.loader import lost_worker
from ddp_sgd.distributed.data_parallel import unused_parameters
from ddp_sgd.engine.triggers import StopRequest
from ddp_sgd.errors import (
    DataError,
    DeviceError,
    DivergedError,
    LostWorkerError,
    StoppedError,
)
from ddp_sgd.out_of_memory import Use, refuse_out_of_memory
from ddp_sgd.text import first_line

_PATIENCE = 10
"""Steps in a row without a finite gradient that end a run."""

_LABEL = re.compile(
    r"device-side assert"
    r"|Target -?\d+ is out of bounds"  # cross_entropy, nll_loss
    r"|target out of range"  # multi_margin_loss
    r"|Class values must be"  # one_hot
)
"""What torch says of a label out of range."""


@contextmanager
def translate_errors(stop: StopRequest | None = None) -> Iterator[None]:
    """Translate the errors that a configuration can fix; others pass unchanged.

    Args:
        stop: A request to stop; a loader process that ends along with it is no error.

    Raises:
        ConfigError: Parameters without a gradient, or too little memory.
        DataError: A label out of range, an index that an embedding lacks, or a loader process that
            was killed.
        DeviceError: The device reports another error.
        StoppedError: A loader process was killed, and this one asked to stop.
    """
    try:
        with _lost_workers(stop):
            yield
    except (RuntimeError, IndexError, MemoryError) as error:
        refuse_out_of_memory(error, Use.STEP)
        if "finished reduction in the prior iteration" in str(error):
            raise unused_parameters() from error
        if _LABEL.search(str(error)):
            raise _label_out_of_range(error) from error
        if "index out of range in self" in str(error):
            raise _index_out_of_range() from error
        if isinstance(error, torch.AcceleratorError):
            raise DeviceError(
                f"the device reports: {first_line(error)}; set CUDA_LAUNCH_BLOCKING=1 and run "
                "again with --debug, which then shows where."
            ) from error
        raise


@contextmanager
def _lost_workers(stop: StopRequest | None) -> Iterator[None]:
    """Tell a loader process that was killed from one that a stop has ended, too."""
    try:
        yield
    except (RuntimeError, LostWorkerError) as error:
        lost = error if isinstance(error, LostWorkerError) else lost_worker(error)
        if lost is None:
            raise
        if stop is None or stop.reason is None:
            raise lost from error
        raise StoppedError(
            f"stopped by {stop.reason}, which ended a loader process in the middle of a step; "
            "start again to go on from the newest checkpoint."
        ) from error


def refuse_divergence(skipped: SkippedSteps, lr: float) -> None:
    """End a run whose gradients stay non-finite.

    Args:
        skipped: Steps without a finite gradient.
        lr: Rate of the last step.

    Raises:
        DivergedError: There were 10 or more.
    """
    if skipped.longest_row >= _PATIENCE:
        raise DivergedError(
            f"the gradient is not finite for {skipped.longest_row} steps in a row at a rate of "
            f"{lr:g}; lower optim.lr, warm up longer, set optim.clip_norm, or look for bad samples."
        )


def _label_out_of_range(error: Exception) -> DataError:
    return DataError(
        f"a batch has a label that the model has no score for: {first_line(error)}; number the "
        "labels from 0 to the number of classes less one."
    )


def _index_out_of_range() -> DataError:
    return DataError(
        "a batch has an index, such as that of a word, for which an embedding of the model has no "
        "row; number the indices from 0, or set num_embeddings of the embedding to their number."
    )
