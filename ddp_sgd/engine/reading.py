"""How samples are read: batch size, workers, collate function, transforms, place of arrays."""

import socket
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch

from ddp_sgd.config.component import Component
from ddp_sgd.config.sections import DataConfig
from ddp_sgd.data.augment import NO_TRANSFORMS, Transforms
from ddp_sgd.data.fetcher import Collate
from ddp_sgd.data.order import OrderFunction
from ddp_sgd.data.placement import ArrayPair, choose_arrays
from ddp_sgd.data.selection import Selection
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
        order: Which training samples make a step: ``shuffled``, ``sequential``, or a function of
            (n, seed, epoch, global batch).
        selection: Chooses input and target of a sample; None: samples are pairs.
        eval_batch_size: Samples of a chunk of an evaluation; None: those of a micro-batch.
    """

    batch_size: int
    workers: int
    seed: int
    collate: Collate | None = None
    device: str = "auto"
    train_transforms: Transforms = NO_TRANSFORMS
    eval_transforms: Transforms = NO_TRANSFORMS
    order: str | OrderFunction = "shuffled"
    selection: Selection | None = None
    eval_batch_size: int | None = None

    @property
    def chunk_size(self) -> int:
        """Samples of a chunk of an evaluation."""
        return self.eval_batch_size or self.batch_size


def build_reading(
    data: DataConfig, seed: int, *, trains: bool = True, eval_batch_size: int | None = None
) -> Reading:
    """Build collate function and transforms of section ``data``, and return how to read.

    Args:
        data: Section ``data`` of the configuration.
        seed: Seed of the run.
        trains: Whether the transforms and the order of training are built, too.
        eval_batch_size: ``eval.batch_size``.

    Raises:
        ConfigError: The collate function, a transform or the order cannot be called.
    """
    collate = None if data.collate is None else instantiate(data.collate, "data.collate")
    if data.collate is not None and not callable(collate):
        raise ConfigError(
            f"data.collate is a {type(collate).__name__}; name a function from a list of samples "
            "to a batch (inputs, targets)."
        )
    train = _build_transforms(data.train_transforms if trains else (), "train", seed)
    eval_ = _build_transforms(data.eval_transforms, "eval", seed)
    return Reading(
        batch_size=data.batch_size,
        workers=data.workers,
        seed=seed,
        collate=collate,
        device=data.device,
        train_transforms=train,
        eval_transforms=eval_,
        order=ready_order(data.order) if trains else "shuffled",
        selection=None if data.input is None else Selection(data.input, data.target),
        eval_batch_size=eval_batch_size,
    )


def ready_order(chosen: str | Component) -> str | OrderFunction:
    """Build the order that ``data.order`` names, if that is a component.

    Raises:
        ConfigError: It cannot be called, or is a class, whose call would make an order.
    """
    if isinstance(chosen, str):
        return chosen
    order = instantiate(chosen, "data.order")
    if not callable(order) or isinstance(order, type):
        raise ConfigError(
            f"data.order is a {type(order).__name__}; name a function of (n, seed, epoch, "
            "global_batch) that returns indices, with call: false, or a class of such objects."
        )
    return cast("OrderFunction", order)


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
        selection=reading.selection,
    )


def _ranks_on_device(runtime: Runtime) -> int:
    """Count the ranks that share the device of this one."""
    if runtime.alone or runtime.device.type != "cuda":
        return 1
    device = torch.cuda.get_device_properties(runtime.device)
    name = socket.gethostname(), str(getattr(device, "uuid", runtime.device.index))
    return gather_over_ranks(name, runtime).count(name)
