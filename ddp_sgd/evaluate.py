"""Command: score a saved model on any number of ranks.

Usage: ``torchrun --nproc_per_node=4 -m ddp_sgd.evaluate runs/digits/checkpoints/best``.
"""

import json
import math
import os
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_sgd.checkpointing.store import Header
from ddp_sgd.cli import run_command
from ddp_sgd.config import CommandLine, Component, RunConfig, dump_yaml
from ddp_sgd.console import deliver, say_error
from ddp_sgd.distributed.environment import may_be_rank_0, only_on_rank, read_ranks
from ddp_sgd.distributed.process_exit import leave
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.instantiate import instantiate, refuse_untrusted

if TYPE_CHECKING:
    from torch.nn import Module

    from ddp_sgd.distributed.runtime import Runtime
    from ddp_sgd.engine.evaluation import Metrics
    from ddp_sgd.losses import LossFunction


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="build whatever the checkpoint names, which runs its code; without it, classes "
        "outside of ddp_sgd, torch, torchvision and timm must be named by the caller",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Score a saved model, and return the exit code of the contract.

    Args:
        argv: Arguments after the name of the command; None takes those of the process.
    """
    return run_command(
        evaluate,
        argv,
        program="python -m ddp_sgd.evaluate",
        about="Score a saved model. CHECKPOINT is a file, a link such as "
        "runs/digits/checkpoints/best, or a run folder, which stands for its newest whole "
        "checkpoint. Model, loss and data are those of the run, with the options that follow laid "
        "over them; runtime.* is of today alone.",
        add_options=_add_options,
        argument="CHECKPOINT",
    )


def evaluate(line: CommandLine) -> int:
    """Join the ranks that the environment names, and score."""
    with only_on_rank(this_one=may_be_rank_0(os.environ)):
        read_ranks(os.environ)
    from ddp_sgd.distributed.runtime import start_runtime

    place = line.config.runtime
    with start_runtime(
        backend=place.backend, device=place.device, timeout_s=place.timeout_s
    ) as runtime:
        lines = _work(line, runtime)
    if runtime.rank == 0:
        deliver("".join(f"{text}\n" for text in lines))
    return 0


def _work(line: CommandLine, runtime: "Runtime") -> list[str]:
    """Give what rank 0 prints."""
    from ddp_sgd.report.progress import last_line

    is_trusted = line.options["trust"] or line.options["print_config"]
    given = None if is_trusted else line.given.values
    saved = look_up(Path(line.argument), line.over, runtime, given)
    if line.options["print_config"]:
        return [dump_yaml(saved.config).rstrip("\n")]
    scores, digest = score_again(saved, runtime)
    header = saved.header
    plain = {name: _plain(value) for name, value in scores.items()}
    row = {
        "checkpoint": str(saved.file),
        "step": header.step,
        "epoch": header.epochs,
        "samples": header.samples,
        "world_size": runtime.world_size,
        "weights_digest": digest,
        **plain,
    }
    summary = last_line({"status": str(saved.file), "step": header.step, **plain})
    if header.is_scored and header.scores != scores:
        name, value = next(iter(header.scores.items()))
        summary += f"; the run itself wrote {name} {value:.6g}"
    return [summary, json.dumps(row, allow_nan=False)]


def _plain(value: Any) -> Any:
    """Turn NaN and infinity into null, since JSON has no word for them."""
    return value if math.isfinite(value) else None


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
    runtime: "Runtime",
    given: Mapping[str, Any] | None = None,
) -> Saved:
    """Find and verify a checkpoint on rank 0, and send it to the others.

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
    from ddp_sgd.checkpointing.serialization import find_checkpoint
    from ddp_sgd.distributed.collectives import from_rank_0

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
    held_out = data.eval_sets.values()
    built = (config.model, config.loss, *held_out, data.collate, *data.eval_transforms)
    return [component.model_dump() for component in built if component]


def score_again(saved: Saved, runtime: "Runtime") -> "tuple[Metrics, str]":
    """Score a saved model on every sample of ``data.eval``, of all its sets.

    Returns:
        The scores, and the digest of the weights; equal on all ranks, on any number of them.

    Raises:
        ConfigError: There is no held-out set, or model, loss, data and weights do not fit together.
        DataError: The checkpoint or the samples cannot be read.
    """
    from ddp_sgd.engine.precision import torch_settings
    from ddp_sgd.errors import translate_errors

    config = saved.config
    if config.data.eval is None:
        raise ConfigError(
            "data.eval is null; name a data set, such as "
            "--data.eval.class_path=ddp_sgd.data.Digits --data.eval.init_args.split=eval."
        )

    def notice(line: str) -> None:
        if runtime.rank == 0:
            say_error(f"note      {line}")

    with translate_errors(), torch_settings(config.compute, runtime.device, notice):
        return _score(saved, runtime)


def _score(saved: Saved, runtime: "Runtime") -> "tuple[Metrics, str]":
    """Build the data sets and the model, load the weights and score them."""
    from ddp_sgd.checkpointing.serialization import read_tensors
    from ddp_sgd.data.dataset_checks import OpenFiles
    from ddp_sgd.distributed.collectives import broadcast_buffers, broadcast_parameters
    from ddp_sgd.distributed.progress import ProgressTracker
    from ddp_sgd.engine import components
    from ddp_sgd.engine.precision import Numerics
    from ddp_sgd.engine.reading import build_reading
    from ddp_sgd.engine.result import weights_digest
    from ddp_sgd.engine.setup import build_scorer
    from ddp_sgd.losses import as_module, loss_modules

    config = saved.config
    eval_sets = _build_sets(config)
    files = OpenFiles(*eval_sets.values())
    model = components.ready_model(config.model, config.seed)
    loss = as_module(_fitting_loss(saved))
    size = config.eval.batch_size
    reading = build_reading(config.data, config.seed, trains=False, eval_batch_size=size)
    if not components.is_materialized(model):
        where, first = next(iter(eval_sets.items()))
        batch = components.read_sample_batch(first, where, reading)
        components.materialize_lazy(model, loss, batch, config.seed)
    modules = loss_modules(loss, model)
    kept = modules if _is_loss_of(saved) else {}
    if runtime.rank == 0:
        _load(model, kept, read_tensors(saved.file), saved.config)
    for module in (model, *modules.values()):
        module.to(runtime.device)
        broadcast_parameters(module, runtime)
        broadcast_buffers(module, runtime)
    numerics = Numerics(config.compute, runtime.device)
    numerics.arrange(model)
    how = reading, runtime, ProgressTracker(), numerics
    scorers = [
        build_scorer(model, loss, each, *how, where=where) for where, each in eval_sets.items()
    ]
    if config.data.workers:
        files.close()
    scores = {name: value for score in scorers for name, value in score().items()}
    return scores, weights_digest(model)


def _build_sets(config: RunConfig) -> dict[str, Any]:
    """Build the held-out sets by their keys."""
    from ddp_sgd.engine.data_sets import check_dataset

    found = {}
    for where, component in config.data.eval_sets.items():
        found[where] = instantiate(component, where, failure=DataError)
        check_dataset(found[where], where)
    return found


def _fitting_loss(saved: Saved) -> "LossFunction":
    """Build the loss; refuse another one than the run's that was not requested."""
    from ddp_sgd.engine.components import ready_loss
    from ddp_sgd.engine.train_state import describe_loss

    loss = ready_loss(saved.config.loss)
    if _is_loss_of(saved) and describe_loss(loss) != saved.header.loss:
        raise ConfigError(
            f"loss is {describe_loss(loss)}, while the run was given {saved.header.loss} in "
            "Python; name the one to score with, as --loss.class_path=..."
        )
    return loss


def _is_loss_of(saved: Saved) -> bool:
    """Whether the loss that is scored with is that of the run."""
    before, now = saved.header.config["loss"], saved.config.loss
    return (now is None) if before is None else (now == Component.model_validate(before))


def _load(
    model: "Module",
    modules: "Mapping[str, Module]",
    tensors: Mapping[str, Any],
    config: RunConfig,
) -> None:
    """Load the weights, and the buffers that the run's steps changed besides."""
    from ddp_sgd.engine.buffers import buffers_by_name
    from ddp_sgd.engine.train_state import model_misfits, restore

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


if __name__ == "__main__":
    leave(main())
