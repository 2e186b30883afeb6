"""State dict of a run: what a resume needs and the step does not determine; gathered and loaded.

Run state: step, epoch, scores. What can be computed from the step is not kept here.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ddp_sgd import __version__
from ddp_sgd.checkpointing.serialization import read_tensors
from ddp_sgd.checkpointing.store import Header, SkippedSteps
from ddp_sgd.data.order import ORDER, name_order
from ddp_sgd.distributed.collectives import broadcast_buffers, broadcast_parameters, from_rank_0
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import (
    TrainingBuffers,
    buffer_at,
    buffers_by_name,
    is_saved,
)
from ddp_sgd.engine.evaluation import Metrics
from ddp_sgd.errors import RefusedError
from ddp_sgd.losses import LossFunction
from ddp_sgd.optim.sgd import SGD
from ddp_sgd.plan import Plan
from ddp_sgd.tree import misfits


@dataclass(slots=True)
class State:
    """The moving part of a run besides weights and momentum buffers.

    Attributes:
        step: Optimizer steps taken, skipped ones included.
        scores: The last evaluation.
        scored_at: Step of the last evaluation.
        skipped: Steps without a finite gradient.
    """

    step: int = 0
    scores: Metrics = field(default_factory=dict)
    scored_at: int = 0
    skipped: SkippedSteps = field(default_factory=SkippedSteps)


Tree = Mapping[str, Any]


def run_state_dict(
    state: State,
    *,
    model: nn.Module,
    optimizer: SGD,
    plan: Plan,
    config: Mapping[str, Any],
    run_id: str,
    loss: str,
) -> tuple[Header, Tree]:
    """Gather the state, where it is.

    Args:
        state: Where the run stands.
        model: The model itself, not its wrapper.
        optimizer: SGD over its parameters.
        plan: The run's arithmetic.
        config: Description of the run, as plain data.
        run_id: Identity of the run.
        loss: What the loss is, from ``describe_loss``.

    Returns:
        The header, and the tensors where they are: ``model`` and ``optimizer``, by name.
    """
    epoch, position = plan.place_at(state.step)
    header = Header(
        step=state.step,
        epoch=epoch,
        position=position,
        samples=plan.samples_at(state.step),
        scored_at=state.scored_at,
        scores=dict(state.scores),
        skipped=state.skipped,
        world_size=plan.world_size,
        run_id=run_id,
        loss=loss,
        plan={name: getattr(plan, name) for name in plan.__slots__},
        config=dict(config),
        versions={
            "ddp_sgd": __version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "order": name_order(config["data"]["order"]),
        },
    )
    return header, {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def other_state_dict(
    model: nn.Module, loss_modules: Mapping[str, nn.Module], buffers: TrainingBuffers
) -> Tree:
    """Gather the buffers that the ``state_dict`` of the model lacks.

    Args:
        model: The model itself, not its wrapper.
        loss_modules: Modules of the loss, by where they were found.
        buffers: The buffers that steps change.

    Returns:
        ``buffers``: non-persistent buffers of the model that steps change; ``loss_buffers``:
        all buffers of the loss; each by name, and left out if there are none.
    """
    unsaved = {
        name: place
        for name, place in buffers_by_name({"": model}).items()
        if place in buffers and not is_saved(place)
    }
    both = {"buffers": unsaved, "loss_buffers": buffers_by_name(loss_modules)}
    return {
        key: {name: buffer_at(place) for name, place in places.items()}
        for key, places in both.items()
        if places
    }


def describe_loss(loss: LossFunction) -> str:
    """Name a loss by its class, or function, and the shapes of the tensors that it holds."""
    while isinstance(loss, partial):
        loss = loss.func
    kind = type(loss) if isinstance(loss, nn.Module) else loss
    name = f"{kind.__module__}.{getattr(kind, '__qualname__', type(kind).__name__)}"
    held = loss.state_dict() if isinstance(loss, nn.Module) else {}
    tensors = {key: value for key, value in held.items() if isinstance(value, torch.Tensor)}
    shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items())
    return f"{name}({shapes})"


def refuse_misfit(
    header: Header,
    tensors: Mapping[str, Any],
    model: nn.Module,
    *,
    samples: int,
    loss: str,
    order: str = ORDER,
) -> None:
    """Refuse a checkpoint of another model, data set or loss.

    Args:
        header: Where the run stood.
        tensors: Content of the checkpoint.
        model: The model of today.
        samples: Length of the training set.
        loss: What the loss is, from ``describe_loss``.
        order: What the order of samples is, from ``name_order``.

    Raises:
        RefusedError: It does not fit; the message lists what differs.
    """
    differences = model_misfits(tensors["model"], model) + _other_parts(header, samples, loss)
    before = header.versions.get("order", "torch.randperm")
    if header.position and before != order:  # some samples of the epoch would count twice
        differences.append(f"the order of samples was {before}, is {order}")
    if differences:
        raise _misfit(header.step, differences)


def refuse_other_parts(header: Header | None, train_set: Any, loss: LossFunction | None) -> None:
    """Refuse to take a run that is finished for one with other data, or another loss.

    Args:
        header: Where the run stood; None if nothing is left of it.
        train_set: Data that were given today; None if none were.
        loss: The loss that was given today; None if none was.

    Raises:
        RefusedError: They are not those of the run.
    """
    samples = None if train_set is None else len(train_set)
    name = None if loss is None else describe_loss(loss)
    if header and (differences := _other_parts(header, samples, name)):
        raise _misfit(header.step, differences)


def _other_parts(header: Header, samples: int | None, loss: str | None) -> list[str]:
    """List where length of the data, and loss, differ from those of a run; None is equal."""
    differences = []
    if samples not in (None, header.plan["samples"]):
        differences.append(f"data.train had {header.plan['samples']} samples, has {samples}")
    if loss not in (None, header.loss):
        differences.append(f"the loss was {header.loss}, is {loss}")
    return differences


def hand_over(model: nn.Module, file: Path | None, runtime: Runtime) -> None:
    """Give a model the weights of a run that has nothing left to do, on all ranks.

    Args:
        model: Moved to the runtime's device, changed in place.
        file: The last checkpoint, on the rank that has it; where nothing is left of it, weights
            stay as they are.
        runtime: This process.

    Raises:
        DataError: The checkpoint cannot be read.
        RefusedError: It is of another model.
    """
    model.to(runtime.device)
    if file is not None:
        tensors = read_tensors(file)
        if differences := model_misfits(tensors["model"], model):
            raise _misfit(_step_of(tensors), differences)
        restore(model, tensors)
    broadcast_state(model, runtime)


def restore(model: nn.Module, tensors: Mapping[str, Any]) -> None:
    """Put weights and buffers back; ``refuse_misfit`` has looked at them.

    Args:
        model: Changed in place.
        tensors: Content of the checkpoint.

    Raises:
        RefusedError: A module does not take its state back.
    """
    for name, place in buffers_by_name({"": model}).items():
        saved = tensors["model"].get(name)
        if isinstance(saved, torch.Tensor) and not buffer_at(place).numel():
            buffer_at(place).resize_(saved.shape)  # sized at its first use
    for name, (module, own) in buffers_by_name({"": model}, unset=True).items():
        saved = tensors["model"].get(name)
        if isinstance(saved, torch.Tensor):
            module._buffers[own] = torch.empty_like(saved)  # made at its first use
    try:
        model.load_state_dict(tensors["model"])
    except RuntimeError as error:  # a module that loads its state in its own way
        raise _misfit(_step_of(tensors), [" ".join(str(error).split())]) from error


def model_misfits(saved: Mapping[str, Any], model: nn.Module) -> list[str]:
    """List what a model lacks, has too much, or has in another shape or type.

    Left out are buffers that get their size in use, and those of modules that load by themselves.

    Args:
        saved: State of a model.
        model: The model of today.
    """
    resized = {
        name
        for name, place in buffers_by_name({"": model}).items()
        if not buffer_at(place).numel() or _loads_by_itself(place[0])
    } | buffers_by_name({"": model}, unset=True).keys()
    now = {name: value for name, value in model.state_dict().items() if name not in resized}
    return misfits({name: v for name, v in saved.items() if name not in resized}, now)


def _loads_by_itself(module: nn.Module) -> bool:
    own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return own and not isinstance(module, _NormBase)


def restore_buffers(
    model: nn.Module,
    loss_modules: Mapping[str, nn.Module],
    buffers: TrainingBuffers,
    tensors: Mapping[str, Any],
) -> None:
    """Put back the buffers that the ``state_dict`` of the model lacks, and those of the loss.

    Args:
        model: Changed in place.
        loss_modules: Modules of the loss, by where they were found; changed in place.
        buffers: The buffers that steps change.
        tensors: Content of the checkpoint, perhaps of a release that did not save these.

    Raises:
        RefusedError: A buffer of the loss that steps do not change, such as class weights, differs.
    """
    for name, saved in tensors.get("buffers", {}).items():
        _register(model, name, saved)
    for key, modules in (("buffers", {"": model}), ("loss_buffers", loss_modules)):
        places = buffers_by_name(modules)
        for name, saved in tensors.get(key, {}).items():
            if name not in places:
                continue
            module, own = places[name]
            now = buffer_at((module, own))
            if (module, own) in buffers:
                module._buffers[own] = saved.to(now.device)
            elif not torch.equal(saved, now.cpu()):
                raise _misfit(_step_of(tensors), [f"{name} of the loss had other values"])


def _register(model: nn.Module, name: str, saved: torch.Tensor) -> None:
    """Register a buffer that steps made, and that no checkpoint of the model itself holds."""
    path, _, own = name.rpartition(".")
    module = dict(model.named_modules()).get(path)
    if module is not None and getattr(module, own, None) is None:
        device = next((p.device for p in model.parameters()), saved.device)
        module.register_buffer(own, saved.to(device), persistent=False)


def broadcast_state(model: nn.Module, runtime: Runtime) -> None:
    """Give every rank the parameters, the buffers and the extra state of rank 0."""
    broadcast_parameters(model, runtime)
    broadcast_buffers(model, runtime)
    model.load_state_dict(from_rank_0(other_entries(model), runtime), strict=False)


def other_entries(model: nn.Module) -> dict[str, Any]:
    """Return what the ``state_dict`` of a model holds besides parameters and buffers."""
    known = {
        name
        for named in (model.named_parameters, model.named_buffers)
        for name, _ in named(remove_duplicate=False)
    }
    return {name: value for name, value in model.state_dict().items() if name not in known}


def _step_of(tensors: Mapping[str, Any]) -> int:
    return int(tensors["cursor"]["step"])


def _misfit(step: int, differences: list[str]) -> RefusedError:
    shown = ", ".join(differences[:8]) + (", ..." if len(differences) > 8 else "")
    return RefusedError(
        f"the checkpoint of step {step} is of another run: {shown}; restore that, or set "
        "resume=never to begin again."
    )
