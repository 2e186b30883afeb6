"""State dict of a run: what a resume needs and the step does not determine.

Run state: step, epoch, scores. What can be computed from the step is not kept here.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from ddp_sgd import __version__
from ddp_sgd.checkpointing.manifest import Header, SkippedSteps
from ddp_sgd.data.sampler import ORDER
from ddp_sgd.engine.buffers import TrainingBuffers, buffer_at, buffers_by_name, is_saved
from ddp_sgd.engine.evaluation import Metrics
from ddp_sgd.errors import ConfigError
from ddp_sgd.losses import LossFunction
from ddp_sgd.optim.sgd import SGD
from ddp_sgd.plan import Plan


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

_PLAIN = (torch.Tensor, nn.Parameter, int, float, bool, str, bytes, complex, type(None))
"""What a reader takes; a class derived from one of them is code of somebody's."""


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
            "order": ORDER,
        },
    )
    momentum = dict(momentum_buffers(model, optimizer))
    return header, {"model": model.state_dict(), "optimizer": {"momentum_buffer": momentum}}


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


def refuse_foreign(tree: Any, path: str = "model") -> None:
    """Refuse state that could be written but not read back: reading runs no code.

    Args:
        tree: Tensors and plain data, nested.
        path: Where the tree is, for the error.

    Raises:
        ConfigError: It holds something else.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            refuse_foreign(key, f"{path}.{key}")
            refuse_foreign(value, f"{path}.{key}")
    elif type(tree) in (list, tuple, torch.Size):
        for number, value in enumerate(tree):
            refuse_foreign(value, f"{path}.{number}")
    elif type(tree) not in _PLAIN:
        raise ConfigError(
            f"the state {path} is a {type(tree).__name__}, which a checkpoint cannot hold; keep "
            "tensors and plain numbers, text, lists and mappings in the state of the model."
        )
    elif isinstance(tree, torch.Tensor) and tree.layout is not torch.strided:
        layout = str(tree.layout).removeprefix("torch.")
        raise ConfigError(
            f"the state {path} has the layout {layout}, which a checkpoint cannot hold; pass "
            "persistent=False to register_buffer, or make it dense with .to_dense()."
        )


def momentum_buffers(model: nn.Module, optimizer: SGD) -> list[tuple[str, torch.Tensor]]:
    """List the momentum buffers with the names of their parameters, in the order of the model."""
    return [
        (name, optimizer.momentum_buffers[parameter])
        for name, parameter in model.named_parameters()
        if parameter in optimizer.momentum_buffers
    ]


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
