"""Errors of torch in the middle of a run, said in the words of the configuration."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddp_sgd.distributed.replica import unused_parameters
from ddp_sgd.errors import ConfigError, DataError, DivergedError

_PATIENCE = 10
"""Steps in a row without a finite gradient that end a run."""


@contextmanager
def plain_faults() -> Iterator[None]:
    """Translate the errors that a configuration can mend; others pass unchanged.

    Raises:
        ConfigError: Parameters without a gradient, or too little memory on the device.
        DataError: A label out of range.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"data.batch_size is too large for the memory of the device: {_first_line(error)}; "
            "lower data.batch_size and raise data.accumulate by the same factor: the steps stay "
            "the same."
        ) from error
    except RuntimeError as error:
        if "device-side assert" in str(error):
            raise _label_out_of_range(error) from error
        if "finished reduction in the prior iteration" not in str(error):
            raise
        raise unused_parameters() from error
    except IndexError as error:
        if not re.search(r"Target -?\d+ is out of bounds", str(error)):
            raise
        raise _label_out_of_range(error) from error


def refuse_divergence(skipped: tuple[int, int, int], lr: float) -> None:
    """End a run whose gradients stay non-finite.

    Args:
        skipped: Steps without a finite gradient: all, those in a row by now, the longest row.
        lr: Rate of the last step.

    Raises:
        DivergedError: There were 10 or more.
    """
    if skipped[2] >= _PATIENCE:
        raise DivergedError(
            f"the gradient is not finite for {skipped[2]} steps in a row at a rate of "
            f"{lr:g}; lower optim.lr, warm up longer, set optim.clip_norm, or look for bad samples."
        )


def _label_out_of_range(error: Exception) -> DataError:
    return DataError(
        f"a batch has a label that the model has no score for: {_first_line(error)}; number the "
        "labels from 0 to the number of classes less one."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
