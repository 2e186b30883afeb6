"""Evaluation of a saved model: rank 0 reads the file, all ranks score."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ddp_sgd.checkpointing.manifest import Header
from ddp_sgd.checkpointing.serialization import find_checkpoint, read_tensors
from ddp_sgd.config import Component, RunConfig
from ddp_sgd.data.dataset_checks import OpenFiles
from ddp_sgd.distributed.collectives import broadcast_buffers, broadcast_parameters, from_rank_0
from ddp_sgd.distributed.progress import ProgressTracker
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import buffers_by_name
from ddp_sgd.engine.components import (
    build_reading,
    check_dataset,
    is_materialized,
    materialize_lazy,
    read_batch,
    ready_loss,
    ready_model,
)
from ddp_sgd.engine.evaluation import Metrics
from ddp_sgd.engine.result import weights_digest
from ddp_sgd.engine.setup import build_scorer
from ddp_sgd.engine.train_state import describe_loss, model_misfits, restore
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.instantiate import instantiate, refuse_untrusted
from ddp_sgd.losses import LossFunction, as_module, loss_modules
from ddp_sgd.torch_errors import translate_errors


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
    path: Path,
    resolve: Callable[[Mapping[str, Any]], RunConfig],
    runtime: Runtime,
    given: Mapping[str, Any] | None = None,
) -> Saved:
    """Find and verify a checkpoint on rank 0, and tell the others.

    Args:
        path: A checkpoint, a link to one, or a run folder.
        resolve: Lays today's changes over the configuration of the run.
        runtime: This process.
        given: What the caller has set by himself, whose class paths may be built, besides those of
            ddp_sgd, torch, torchvision and timm; None: all may.

    Raises:
        DataError: There is none, or it is damaged.
        ConfigError: The changes do not fit.
        RefusedError: The checkpoint names other class paths.
    """
    saved = None
    if runtime.rank == 0:
        file, manifest = find_checkpoint(path)
        config = resolve(manifest.header.config)
        if given is not None:
            refuse_untrusted(_components(config), given, str(file))
        saved = Saved(file=file, header=manifest.header, config=config)
    return from_rank_0(saved, runtime)


def _components(config: RunConfig) -> list[Any]:
    """What a score builds, as plain data."""
    data = config.data
    built = (config.model, config.loss, data.eval, data.collate)
    return [component.model_dump() for component in built if component]


def score_again(saved: Saved, runtime: Runtime) -> tuple[Metrics, str]:
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
    with translate_errors():
        eval_set = instantiate(config.data.eval, "data.eval", failure=DataError)
        check_dataset(eval_set, "data.eval")
        files = OpenFiles(eval_set)
        model = ready_model(config.model, config.seed)
        loss, reading = as_module(_fitting_loss(saved)), build_reading(config.data, config.seed)
        if not is_materialized(model):
            batch = read_batch(
                eval_set, "data.eval", batch_size=reading.batch_size, collate=reading.collate
            )
            materialize_lazy(model, loss, batch, config.seed)
        modules = loss_modules(loss, model)
        kept = modules if _is_loss_of(saved) else {}
        if runtime.rank == 0:
            _load(model, kept, read_tensors(saved.file), saved.config)
        for module in (model, *modules.values()):
            module.to(runtime.device)
            broadcast_parameters(module, runtime)
            broadcast_buffers(module, runtime)
        score = build_scorer(model, loss, eval_set, reading, runtime, ProgressTracker())
        if config.data.workers:
            files.close()
        return score(), weights_digest(model)


def _fitting_loss(saved: Saved) -> LossFunction:
    """Build the loss; refuse another one than the run's that nobody has asked for."""
    loss = ready_loss(saved.config.loss)
    if _is_loss_of(saved) and describe_loss(loss) != saved.header.loss:
        raise ConfigError(
            f"loss is {describe_loss(loss)}, while the run was given {saved.header.loss} in "
            "Python; name the one to score with, as --loss.class_path=..."
        )
    return loss


def _is_loss_of(saved: Saved) -> bool:
    """Whether the loss that is scored with is that of the run."""
    return saved.config.loss == Component.model_validate(saved.header.config["loss"])


def _load(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tensors: Mapping[str, Any],
    config: RunConfig,
) -> None:
    """Load the weights, and the buffers that the run's steps changed besides."""
    if differences := model_misfits(tensors["model"], model):
        shown = ", ".join(differences[:6]) + (", ..." if len(differences) > 6 else "")
        raise ConfigError(
            f"model is {config.model.class_path}, which the saved weights do not fit: {shown}; "
            "name the model that was trained, with --model.class_path and --model.init_args."
        )
    restore(model, tensors)
    places = buffers_by_name({"": model}) | buffers_by_name(modules)
    for name, value in (tensors.get("buffers", {}) | tensors.get("loss_buffers", {})).items():
        if name in places:
            module, own = places[name]
            module._buffers[own] = value
