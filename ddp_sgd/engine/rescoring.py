"""The score of a saved model: rank 0 reads the file, all ranks score."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ddp_sgd.building import build
from ddp_sgd.checkpointing.comparing import misfits
from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.reading import find_checkpoint, read_tensors
from ddp_sgd.config import Component, RunConfig
from ddp_sgd.distributed.collectives import broadcast_over_ranks, from_rank_0
from ddp_sgd.distributed.pulse import Pulse
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.assembly import build_scorer, ready_loss, ready_model
from ddp_sgd.engine.capture import describe_loss
from ddp_sgd.engine.diagnosis import plain_faults
from ddp_sgd.engine.digest import weights_digest
from ddp_sgd.engine.evaluation import Metrics
from ddp_sgd.engine.trial import check_dataset
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.losses import LossFunction


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint that was verified; equal on all ranks.

    Args:
        file: The file, on rank 0's disk.
        header: Where the run stood.
        config: What to score: the configuration of the run, with today's changes.
    """

    file: Path
    header: Header
    config: RunConfig


def look_up(
    path: Path, resolve: Callable[[Mapping[str, Any]], RunConfig], runtime: Runtime
) -> Saved:
    """Find and verify a checkpoint on rank 0, and tell the others.

    Args:
        path: A checkpoint, a link to one, or a run folder.
        resolve: Lays today's changes over the configuration of the run.
        runtime: This process.

    Raises:
        DataError: There is none, or it is damaged.
        ConfigError: The changes do not fit.
    """
    saved = None
    if runtime.rank == 0:
        file, manifest = find_checkpoint(path)
        config = resolve(manifest.header.config)
        saved = Saved(file=file, header=manifest.header, config=config)
    return from_rank_0(saved, runtime)


def score_anew(saved: Saved, runtime: Runtime) -> tuple[Metrics, str]:
    """Score a saved model on every sample of ``data.eval``.

    Args:
        saved: From ``look_up``.
        runtime: This process.

    Returns:
        The scores, and the digest of the weights; equal on all ranks, on any number of them.

    Raises:
        ConfigError: There is no held-out set, or model, loss, data and weights do not fit together.
        DataError: The checkpoint or the samples cannot be read.
    """
    config = saved.config
    if config.data.eval is None:
        raise ConfigError(
            "data.eval is null; name a data set, such as "
            "--data.eval.class_path=ddp_sgd.data.Digits --data.eval.init_args.split=eval."
        )
    with plain_faults():
        eval_set = build(config.data.eval, "data.eval", failure=DataError)
        check_dataset(eval_set, "data.eval")
        model = ready_model(config)
        loss = _fitting_loss(saved)
        if runtime.rank == 0:
            _load(model, read_tensors(saved.file)["model"], saved.config)
        model.to(runtime.device)
        if isinstance(loss, nn.Module):
            loss.to(runtime.device)
        _share(model, runtime)
        score = build_scorer(config, model, loss, eval_set, runtime, Pulse())
        return score(), weights_digest(model)


def _fitting_loss(saved: Saved) -> LossFunction:
    """Build the loss; refuse another one than the run's that nobody has asked for."""
    loss = ready_loss(saved.config)
    unchanged = saved.config.loss == Component.model_validate(saved.header.config["loss"])
    if unchanged and describe_loss(loss) != saved.header.loss:
        raise ConfigError(
            f"loss is {describe_loss(loss)}, while the run was given {saved.header.loss} in "
            "Python; name the one to score with, as --loss.class_path=..."
        )
    return loss


def _load(model: nn.Module, weights: Mapping[str, Any], config: RunConfig) -> None:
    if differences := misfits(weights, model.state_dict()):
        shown = ", ".join(differences[:6]) + (", ..." if len(differences) > 6 else "")
        raise ConfigError(
            f"model is {config.model.class_path}, which the saved weights do not fit: {shown}; "
            "name the model that was trained, with --model.class_path and --model.init_args."
        )
    model.load_state_dict(weights)


def _share(model: nn.Module, runtime: Runtime) -> None:
    """Give every rank the weights and buffers of rank 0."""
    if runtime.alone:
        return
    for tensor in _tensors(model):
        packed = tensor.contiguous()
        broadcast_over_ranks([packed], runtime)
        if packed is not tensor:
            tensor.copy_(packed)


def _tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from (parameter.detach() for parameter in model.parameters())
    yield from model.buffers()
