"""How samples are read: batch size, workers, collate function, transforms, place of arrays."""

import socket
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ddp_sgd.config.component import Component
from ddp_sgd.config.sections import DataConfig
from ddp_sgd.data.augment import NO_TRANSFORMS, Transforms
from ddp_sgd.data.fetcher import Collate
from ddp_sgd.data.placement import ArrayPair, choose_arrays
from ddp_sgd.distributed.collectives import gather_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.errors import ConfigError
from ddp_sgd.instantiate import instantiate


class Reading(NamedTuple):
    """How samples are read.

    Args:
        batch_size: Samples of a micro-batch.
        workers: Loader processes; 0 reads in this process.
        seed: Seed of the run.
        collate: Function from a list of samples to a batch; None: torch's default_collate.
        train_transforms: Applied to the inputs of training, on the device.
        eval_transforms: Applied to those of evaluation.
        device: Where data sets of arrays live: ``auto``, ``host`` or ``accelerator``.
    """

    batch_size: int
    workers: int
    seed: int
    collate: Collate | None = None
    device: str = "auto"
    train_transforms: Transforms = NO_TRANSFORMS
    eval_transforms: Transforms = NO_TRANSFORMS


def build_reading(data: DataConfig, seed: int, *, trains: bool = True) -> Reading:
    """Build collate function and transforms of section ``data``, and return how to read.

    Args:
        data: Section ``data`` of the configuration.
        seed: Seed of the run.
        trains: Whether the transforms of training are built, too.

    Raises:
        ConfigError: The collate function or a transform cannot be called.
    """
    collate = None if data.collate is None else instantiate(data.collate, "data.collate")
    if data.collate is not None and not callable(collate):
        raise ConfigError(
            f"data.collate is a {type(collate).__name__}; name a function from a list of samples "
            "to a batch (inputs, targets)."
        )
    train = _build_transforms(data.train_transforms if trains else (), "train", seed)
    eval_ = _build_transforms(data.eval_transforms, "eval", seed)
    return Reading(data.batch_size, data.workers, seed, collate, data.device, train, eval_)


def _build_transforms(listed: Sequence[Component], name: str, seed: int) -> Transforms:
    where = f"data.{name}_transforms"
    built = [instantiate(each, f"{where}[{number}]") for number, each in enumerate(listed)]
    return Transforms(built, seed=seed, where=where)


def place_arrays(dataset: Any, where: str, reading: Reading, runtime: Runtime) -> ArrayPair | None:
    """Put the arrays of a data set where they are to live; all ranks call this.

    Args:
        dataset: Map-style data set.
        where: Its key, for errors.
        reading: How samples are read.
        runtime: This process.

    Returns:
        The arrays; None for a data set that is read otherwise.

    Raises:
        ConfigError: ``data.device`` is ``accelerator``, and the data set cannot live there.
    """
    return choose_arrays(
        dataset,
        where,
        wanted=reading.device,
        device=runtime.device,
        workers=reading.workers,
        collate=reading.collate,
        sharing=_ranks_on_device(runtime),
    )


def _ranks_on_device(runtime: Runtime) -> int:
    """Count the ranks that share the device of this one."""
    if runtime.alone or runtime.device.type != "cuda":
        return 1
    device = torch.cuda.get_device_properties(runtime.device)
    name = socket.gethostname(), str(getattr(device, "uuid", runtime.device.index))
    return gather_over_ranks(name, runtime).count(name)
