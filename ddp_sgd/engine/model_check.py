"""Supported models: what cannot be trained exactly is refused before the first step.

Batch normalization: whether every step of a run has the samples that it needs.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from ddp_sgd.errors import ConfigError
from ddp_sgd.plan import Plan, micro_batch_sizes
from ddp_sgd.tree import tensors_in

_TRAINABLE = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.complex64, torch.complex128),
)
_SHARDED = ("DTensor", "FlatParameter", "ShardedTensor")
_WRAPPERS = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def check_model(model: nn.Module) -> None:
    """Refuse models and parameters that data-parallel SGD cannot train as they are.

    Args:
        model: Model as the user built it, on any device.

    Raises:
        ConfigError: The model is wrapped already, or a parameter is sharded, without memory, of a
            type or layout that SGD cannot move.
    """
    for name, module in model.named_modules():
        kind = type(module)
        names = {base.__name__ for base in kind.__mro__}
        if isinstance(module, (DataParallel, DistributedDataParallel)):
            raise ConfigError(
                f"model{_dotted(name)} is wrapped in {kind.__name__}; give the module itself "
                "(its attribute .module): the run keeps the models of all ranks equal."
            )
        if wrapper := names.intersection(_WRAPPERS):
            raise ConfigError(
                f"model{_dotted(name)} is wrapped in {wrapper.pop()}; give the module itself: "
                "every rank holds the whole model, sharded ones are not supported."
            )
    for name, parameter in model.named_parameters():
        if fault := _fault_of(parameter):
            raise ConfigError(f"model.{name} is {fault}.")


def check_embeddings(model: nn.Module, plan: Plan) -> None:
    """Refuse layers whose forward pass changes their weights, where a step has several passes.

    Raises:
        ConfigError: An embedding has ``max_norm`` and a step more than one micro-batch, or sparse
            gradients.
    """
    passes = plan.world_size * plan.accumulate
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            continue
        if module.sparse and module.weight.requires_grad:
            raise ConfigError(
                f"model{_dotted(name)} is an {type(module).__name__} with sparse gradients, which "
                "ranks cannot sum; set sparse=False."
            )
        if module.max_norm is not None and passes > 1:
            raise ConfigError(
                f"model{_dotted(name)} is an {type(module).__name__} with max_norm="
                f"{module.max_norm}, which changes its weights in every forward pass, while a step "
                f"has {passes} of them; set max_norm=None, or train one rank with "
                "data.accumulate=1."
            )


def check_changed_parameters(model: nn.Module, changed: list[nn.Parameter], plan: Plan) -> None:
    """Refuse other models that change their parameters in a forward pass.

    Raises:
        ConfigError: There are some, and a step has more than one forward pass.
    """
    passes = plan.world_size * plan.accumulate
    names = _names(model)
    if passes > 1 and changed:
        raise ConfigError(
            f"model.{names.get(changed[0], 'a parameter')} is changed by the forward pass, while a "
            f"step has {passes} of them, which would differ; change it in a buffer, or train one "
            "rank with data.accumulate=1."
        )


def list_registered(model: nn.Module) -> dict[str, nn.Parameter | None]:
    """List parameters by name, and the names of all buffers, also of those that are None."""
    return {
        f"{path}.{name}".lstrip("."): value if kind == "_parameters" else None
        for path, module in model.named_modules()
        for kind in ("_parameters", "_buffers")
        for name, value in getattr(module, kind).items()
    }


def check_registered(
    model: nn.Module, before: Mapping[str, nn.Parameter | None], by: str = "the forward pass"
) -> None:
    """Refuse parameters and saved buffers that a forward pass has registered.

    Args:
        model: The model, after a forward pass.
        before: What ``list_registered`` gave before it.
        by: What may have registered them, in words.

    Raises:
        ConfigError: There is a new one, or a parameter was replaced.
    """
    for name, value in list_registered(model).items():
        if value is not None and before.get(name) is not value:
            raise ConfigError(
                f"model.{name} is made by {by}, while SGD moves the parameters that "
                "the model had before; make it in __init__, or by a lazy module such as "
                "torch.nn.LazyLinear."
            )
        if name not in before and name in model.state_dict():
            raise ConfigError(
                f"model.{name} is registered by {by}, so that its checkpoints fit no "
                "model that was just built; call register_buffer in __init__, with None if need "
                "be, or pass persistent=False."
            )


def check_gradients(model: nn.Module) -> None:
    """Refuse sparse gradients, after a backward pass.

    Raises:
        ConfigError: A parameter has a sparse gradient.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise ConfigError(
                f"model.{name} is given sparse gradients, which ranks cannot sum; build its layer "
                "with sparse=False."
            )


def check_loss_parameters(modules: Mapping[str, nn.Module]) -> None:
    """Refuse a loss with parameters: SGD moves those of the model alone.

    Args:
        modules: The modules of the loss, by where they were found.

    Raises:
        ConfigError: A parameter of the loss requires a gradient.
    """
    for where, module in modules.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                held = "" if where == "loss" else f" ({where})"
                raise ConfigError(
                    f"loss is {type(module).__name__}{held} with the parameter {name}, which "
                    "would not be trained; make it a part of the model, whose forward then gives "
                    "what the loss needs, or freeze it with requires_grad_(False)."
                )


def how_to_fit(inputs: Any, where: str) -> str:
    """Return the remedy for a model that fails on inputs, such as images of bytes.

    Args:
        inputs: Inputs of a batch.
        where: Key of the data set, which begins with ``data.train`` or ``data.eval``.
    """
    if all(tensor.dtype != torch.uint8 for tensor in tensors_in(inputs)):
        return "make model.init_args fit the data, or transform the data"
    split = "eval" if where.startswith("data.eval") else "train"
    return (
        "make numbers of bytes by {class_path: ddp_sgd.data.augment.Normalize, init_args: {mean: "
        f"0, std: 1}}}} in data.{split}_transforms, or make model.init_args fit the data"
    )


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor covers its memory without gaps and without overlap, in any order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _fault_of(parameter: nn.Parameter) -> str | None:
    """Describe what is wrong with a parameter and what to do; None if it can be used."""
    if {base.__name__ for base in type(parameter).__mro__}.intersection(_SHARDED):
        return (
            f"a {type(parameter).__name__}: sharded parameters are not supported; give a model "
            "that every rank holds whole"
        )
    lazy: bool = is_lazy(parameter)  # as a condition it would narrow the type
    if lazy:
        return None
    if parameter.device.type == "meta":
        return "on the device meta, without memory; build the model on the CPU, or load its weights"
    return _fault_in_training(parameter) if parameter.requires_grad else None


def _fault_in_training(parameter: nn.Parameter) -> str | None:
    if parameter.layout is not torch.strided:
        layout = str(parameter.layout).removeprefix("torch.")
        return f"of the layout {layout}, which SGD cannot move; make it dense with .to_dense()"
    if parameter.dtype not in _TRAINABLE:
        return (
            f"of {str(parameter.dtype).removeprefix('torch.')}, in which SGD cannot move weights; "
            "convert the model with .float()"
        )
    if parameter.numel() and not is_dense(parameter):
        return (
            f"of shape {tuple(parameter.shape)} with strides {parameter.stride()}, which leaves "
            "gaps in its memory or uses some twice; store it with p.data = p.data.contiguous()"
        )
    return None


def _dotted(name: str) -> str:
    return f".{name}" if name else ""


def _names(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


_NOT_SYNCHRONIZED = ("cpu", "mps")
"""Types of devices on which torch's SyncBatchNorm raises."""


class _StepKind(NamedTuple):
    """Steps of one size: name and remedy for the message, samples of all ranks in such a step."""

    name: str
    samples: int
    remedy: str


def check_normalization(
    model: nn.Module, plan: Plan, *, step: int, skip: int, device: torch.device
) -> None:
    """Refuse a run in a step of which batch normalization would fail, or wait for ever.

    A layer that is frozen in evaluation mode, with running statistics, needs nothing. Any other
    needs two samples in each forward pass of a rank: torch requires two values of a channel, and a
    layer on images would take one sample, but its statistics would be those of that image.
    SyncBatchNorm reduces over ranks in each forward pass; all need equal numbers of passes.

    Args:
        model: In the modes in which it is trained.
        plan: The run's arithmetic.
        step: Number of the next step.
        skip: Samples at the head of that step that were trained already.
        device: Where this rank computes.

    Raises:
        ConfigError: A forward pass of a rank has fewer than two samples; or ranks that normalize
            together have different numbers of passes, or a device on which they cannot.
    """
    synchronized, separate = _layers(model, plan.world_size)
    if synchronized and device.type in _NOT_SYNCHRONIZED:
        raise ConfigError(
            f"runtime.device is {device.type} with world size {plan.world_size}, while torch has "
            f"the SyncBatchNorm of {type(model).__name__} on GPUs only; use BatchNorm, or GPUs."
        )
    for kind in _step_kinds(plan, step, skip):
        most, fewest = _sizes_at_the_ends(plan, kind.samples)
        where = f"data.batch_size is {plan.batch_size} with world size {plan.world_size}, so that "
        smallest = min(*most, *(fewest or (0,)))
        if separate and smallest < 2:
            raise ConfigError(
                f"{where}a forward pass in {kind.name} has as few samples as {smallest}, too few "
                f"for the batch normalization of {type(model).__name__}; {kind.remedy}."
            )
        if synchronized and len(most) != len(fewest):
            raise ConfigError(
                f"{where}in {kind.name} some ranks have {len(most)} forward passes and others "
                f"{len(fewest)}, which the synchronized batch normalization of "
                f"{type(model).__name__} would wait for; {kind.remedy}."
            )


def _layers(model: nn.Module, world_size: int) -> tuple[list[nn.Module], list[nn.Module]]:
    """List the layers that use statistics of a batch: those over all ranks, and the others."""
    layers: list[nn.Module] = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    ]
    synchronized: list[nn.Module] = [
        layer
        for layer in layers
        if isinstance(layer, nn.SyncBatchNorm) and layer.training and world_size > 1
    ]
    return synchronized, [layer for layer in layers if layer not in synchronized]


def _step_kinds(plan: Plan, step: int, skip: int) -> Iterator[_StepKind]:
    """Yield a step of each size that the run takes."""
    earlier = "go on with the data.batch_size and the number of ranks of the checkpoint"
    resumed = step > 0 or skip > 0
    if plan.samples_per_epoch >= plan.global_batch:
        larger = "set data.batch_size to at least 2"
        yield _StepKind("a full step", plan.global_batch, earlier if resumed else larger)
    if plan.last_batch < plan.global_batch:
        # Without the tail of an epoch of one step there would be no step.
        drop = "set data.tail=drop, or " if plan.steps_per_epoch > 1 else "set "
        other = f"{drop}another data.batch_size of at least 2"
        yield _StepKind("the last step of an epoch", plan.last_batch, earlier if resumed else other)
    if skip:
        yield _StepKind(
            "the first step after the resume",
            plan.step_samples(step) - skip,
            f"{earlier} until the end of the epoch",
        )


def _sizes_at_the_ends(plan: Plan, samples: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes of the micro-batches of the ranks with the most and with the fewest samples."""
    first, last = (
        micro_batch_sizes(samples, rank, plan.world_size, plan.batch_size)
        for rank in (0, plan.world_size - 1)
    )
    return first, last
