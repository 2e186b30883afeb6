"""``model.after_step(step)``: called after each step that was not skipped, if the model has it.

Momentum encoders, target networks, centers, weight normalization: what a model does to itself
between two steps, on the device, equally on all ranks.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.buffers import TrainingBuffers, buffers_by_name, put_at, tensor_at
from ddp_sgd.engine.model_check import check_registered, list_registered
from ddp_sgd.engine.side_effects import Place, SideEffects
from ddp_sgd.engine.step import StepResult
from ddp_sgd.errors import ConfigError, Use, UserError, refuse_out_of_memory
from ddp_sgd.plan import Plan

NAME = "after_step"


class _Fixed(NamedTuple):
    """A parameter or buffer, and the memory in which a captured step reads it."""

    place: Place
    tensor: torch.Tensor
    memory: torch.Tensor
    pointer: int


class AfterStep:
    """Calls ``model.after_step`` with the number of steps taken, unless the step was skipped.

    On the CPU the norm of the gradient shows whether it was. On other devices nothing waits for
    that: the method is called after every step, and what it did is undone on the device where the
    step was skipped.

    Args:
        model: The model itself, not its wrapper.
        places: Of the parameters and buffers that it may change.
        runtime: This process.
        waits: Whether the norm is looked at; None: on the CPU.

    Attributes:
        places: Of the parameters and buffers that are put back where a step was skipped.
    """

    def __init__(
        self,
        model: nn.Module,
        places: Sequence[Place],
        runtime: Runtime,
        *,
        waits: bool | None = None,
    ) -> None:
        self.places = places
        self._model = model
        self._kept = TrainingBuffers(places, [], runtime)
        self._waits = runtime.device.type == "cpu" if waits is None else waits
        self._fixed: list[_Fixed] = []

    def __call__(self, step: int, result: StepResult) -> None:
        """Call the method after a step, without gradients.

        Args:
            step: Steps taken, this one included, at least 1.
            result: What the step left behind.

        Raises:
            ConfigError: The method fails.
        """
        norm = result.grad_norm
        if self._waits:
            if math.isfinite(norm.item()):
                self._take(step)
            return
        self._kept.keep()
        self._take(step)
        self._kept.restore_where(norm.isfinite().logical_not())

    def _take(self, step: int) -> None:
        call_after_step(self._model, step)
        for each in self._fixed:
            self._write_in_place(each)

    def fix_addresses(self) -> None:
        """Keep parameters and buffers in the memory of now, from which a captured step reads."""
        self._fixed = [
            _Fixed(place, tensor, tensor.detach(), tensor.data_ptr())
            for place in _all_places(self._model)
            if (tensor := tensor_at(place)) is not None and tensor.layout is torch.strided
        ]

    def _write_in_place(self, fixed: _Fixed) -> None:
        """Copy a tensor that was replaced to where the one before it was."""
        now = tensor_at(fixed.place)
        if now is fixed.tensor and now.data_ptr() == fixed.pointer:
            return
        if now is None or (now.shape, now.dtype) != (fixed.memory.shape, fixed.memory.dtype):
            raise ConfigError(
                f"compute.cuda_graphs is true while {NAME} of {type(self._model).__name__} gives "
                f"{fixed.place[1]} another shape or type; write it in place, or set "
                "compute.cuda_graphs=false."
            )
        with torch.no_grad():
            fixed.memory.copy_(now)
        fixed.tensor.data = fixed.memory
        put_at(fixed.place, fixed.tensor)


def call_after_step(model: nn.Module, step: int) -> None:
    """Call the method of a model, without gradients.

    Args:
        model: A model that has it.
        step: Steps taken.

    Raises:
        ConfigError: It fails.
    """
    method: Callable[[int], object] = getattr(model, NAME)
    try:
        with torch.no_grad():
            method(step)
    except UserError:
        raise
    except Exception as error:  # any error of a user's model
        refuse_out_of_memory(error, Use.STEP)
        raise ConfigError(
            f"model is {type(model).__name__}, whose {NAME}({step}) fails, "
            f"{type(error).__name__}: {error}; let it take the number of steps taken, and change "
            "buffers and parameters of the model."
        ) from error


def check_after_step(
    model: nn.Module, plan: Plan, runtime: Runtime, generators: Sequence[torch.Generator]
) -> AfterStep | None:
    """Call the method of a model twice, within a check whose side effects are undone.

    Args:
        model: The model on the runtime's device.
        plan: The run's arithmetic.
        runtime: This process.
        generators: Generators that steps draw from.

    Returns:
        What calls it after a step; None: the model has no such method.

    Raises:
        ConfigError: It fails, or what it does is not saved, or would differ between ranks.
    """
    if getattr(model, NAME, None) is None:
        return None
    kind = f"model is {type(model).__name__}, whose {NAME}"
    if plan.local_start is not None:
        raise ConfigError(
            f"parallel.local_sgd.start_step is {plan.local_start} while the model, "
            f"{type(model).__name__}, has {NAME}, which would work on weights that differ between "
            "ranks; set parallel.local_sgd.start_step=null."
        )
    registered, effects = list_registered(model), SideEffects([model], generators)
    before = [generator.get_state() for generator in generators]
    for step in (1, min(2, plan.total_steps)):
        effects.keep_attributes()  # the first call may fill caches
        call_after_step(model, step)
    if names := effects.changed_attributes():
        raise ConfigError(
            f"{kind} sets {names[0]}, which no checkpoint holds; keep it in a buffer that is "
            "written in place."
        )
    check_registered(model, registered, by=NAME)
    drawn = any(not torch.equal(g.get_state(), s) for g, s in zip(generators, before, strict=True))
    if (drawn or effects.draws_from_random or effects.draws_from_numpy) and not runtime.alone:
        raise ConfigError(
            f"{kind} draws random numbers, which differ between ranks; draw in forward, or from a "
            "generator that is made for the step, such as torch.Generator().manual_seed(step)."
        )
    written = set(effects.written_parameters())
    places = [place for place in _all_places(model) if _may_change(place, written)]
    return AfterStep(model, places, runtime)


def _may_change(place: Place, written: set[nn.Parameter]) -> bool:
    """Whether a place holds a buffer, a frozen parameter, or another that was seen to change."""
    tensor = tensor_at(place)
    if not isinstance(tensor, nn.Parameter):
        return True
    return not tensor.requires_grad or tensor in written


def _all_places(model: nn.Module) -> list[Place]:
    """List all parameters and buffers of a model, those that are shared once."""
    found: dict[int, Place] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (module, name))
    return [*found.values(), *buffers_by_name({"": model}).values()]
