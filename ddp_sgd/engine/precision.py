"""Precision and memory format of forward passes: autocast, TF32, loss scale, channels_last."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ddp_sgd.config import ComputeConfig
from ddp_sgd.distributed.collectives import broadcast_over_ranks, sum_over_ranks
from ddp_sgd.distributed.runtime import Runtime
from ddp_sgd.engine.determinism import deterministic_algorithms
from ddp_sgd.errors import ConfigError
from ddp_sgd.losses import LossFunction, Objective
from ddp_sgd.tree import map_leaves

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of 16 bits, by the value of ``compute.precision`` that names them."""

_NARROW = (torch.bfloat16, torch.float16)


class Numerics:
    """Precision and memory format of the forward passes of a run.

    Autocast is entered for one forward pass and one loss at a time: its cache of weights in 16 bits
    ends there, before a step changes the weights.

    Args:
        compute: Section ``compute`` of the configuration; None: its defaults.
        device: Where the model computes; None: the CPU.

    Attributes:
        scales_loss: Whether gradients are too small for the type, unless the loss is scaled.
    """

    def __init__(
        self, compute: ComputeConfig | None = None, device: torch.device | None = None
    ) -> None:
        compute = compute or ComputeConfig()
        self.scales_loss = compute.precision == "fp16"
        self._device_type = device.type if device else "cpu"
        self._autocast_type = _AUTOCAST.get(compute.precision)
        self._channels_last = compute.channels_last

    def autocast(self) -> AbstractContextManager[Any]:
        """Return ``torch.autocast`` for one pass; a context that does nothing without 16 bits."""
        if self._autocast_type is None:
            return nullcontext()
        return torch.autocast(self._device_type, dtype=self._autocast_type)

    def objective(self, loss: LossFunction, targets: Any, **options: Any) -> Objective:
        """Make an objective whose passes have this precision and memory format.

        Args:
            loss: See ``Objective``.
            targets: See ``Objective``.
            options: See ``Objective``.
        """
        if self._autocast_type is None and not self._channels_last:
            return Objective(loss, targets, **options)
        return _PreciseObjective(self, loss, targets, **options)

    def inputs(self, inputs: Any) -> Any:
        """Return inputs of a model, with images (4-D tensors) in the memory format of the run."""
        if not self._channels_last:
            return inputs
        return map_leaves(_as_channels_last, inputs, is_leaf=lambda each: hasattr(each, "to"))

    def arrange(self, model: nn.Module) -> nn.Module:
        """Give 4-D parameters and buffers of a model the memory format of the run, in place."""
        if self._channels_last:
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = _as_channels_last(tensor.data)
        return model

    def check_parameters(self, model: nn.Module) -> tuple[str, ...]:
        """Look for parameters that have 16 bits themselves; returns notes for the user.

        Raises:
            ConfigError: Scaled gradients would have 16 bits, where they overflow or vanish.
        """
        types = {p.dtype for p in model.parameters() if p.requires_grad}
        if self.scales_loss and torch.float16 in types:
            raise ConfigError(
                "compute.precision is fp16 while parameters of the model are float16 themselves; "
                "keep the model in float32, or set compute.precision=fp32."
            )
        names = [str(t).removeprefix("torch.") for t in _NARROW if t in types]
        if not names:
            return ()
        return (
            f"parameters are {' and '.join(names)}: updates below one part in 256 of a weight are "
            "lost; float32 parameters with compute.precision=bf16 keep them",
        )


class _PreciseObjective(Objective):
    """An objective whose forward pass and loss are computed under autocast."""

    def __init__(
        self, numerics: Numerics, loss: LossFunction, targets: Any, **options: Any
    ) -> None:
        super().__init__(loss, targets, **options)
        self._numerics = numerics

    def outputs(self, model: nn.Module, inputs: Any, targets: Any = None) -> Any:
        """Call the model."""
        with self._numerics.autocast():
            return super().outputs(model, self._numerics.inputs(inputs), targets)

    def values(self, outputs: Any, targets: Any) -> dict[str, torch.Tensor]:
        """Compute the loss, which is summed and logged in 32 bits, whatever the loss gives."""
        with self._numerics.autocast():
            values = super().values(outputs, targets)
            return {n: v.float() if v.dtype in _NARROW else v for n, v in values.items()}


def _as_channels_last(each: Any) -> Any:
    is_image = isinstance(each, torch.Tensor) and each.ndim == 4 and each.layout is torch.strided
    # Not contiguous(): weights of 1 x 1 count as both, and keep strides that gradients lack.
    return each.to(memory_format=torch.channels_last) if is_image else each


_FIRST_SCALE = 2.0**16
_GROWTH, _BACKOFF, _GROWTH_STEPS = 2.0, 0.5, 2000


class LossScale:
    """Dynamic loss scale: gradients times s, so that they do not vanish in 16 bits.

    A step whose scaled gradient is not finite is skipped and halves s; 2000 others in a row double
    it. Where s is above 1 such a step is an overflow, a part of the search for s, and else the
    gradient itself is not finite. All is decided on the device, on the gradient that is equal on
    all ranks, so that s is, too.

    Args:
        device: Where the model computes.

    Attributes:
        scale: s, above 0; a power of two, so that scaling does not round.
        good_steps: Steps in a row that did not overflow, since s has changed.
        overflow_steps: Steps of the run that were overflows.

    Source:
        Micikevicius et al. 2017, arXiv:1710.03740; numbers of torch.amp.GradScaler.
    """

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), _FIRST_SCALE, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.overflow_steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, gradient: list[torch.Tensor]) -> None:
        """Divide the reduced gradient by s, in place."""
        if gradient:
            torch._foreach_mul_(gradient, self.scale.reciprocal())

    def update(self, skipped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Adapt s after a step; nothing waits for the device.

        Args:
            skipped: float32 tensor without dimensions: 1 if the gradient was not finite, else 0.

        Returns:
            The s that the step had, and the overflows of the run so far.
        """
        skipped = skipped.to(self.scale.device)  # without any gradient it is on the host
        used = self.scale.clone()
        self.overflow_steps += (skipped * (used > 1)).int()
        torch._amp_update_scale_(
            self.scale, self.good_steps, skipped, _GROWTH, _BACKOFF, _GROWTH_STEPS
        )
        return used, self.overflow_steps.clone()

    def agree(self, runtime: Runtime) -> None:
        """Take the smallest scale of any rank, after steps that ranks took on their own."""
        mine = torch.stack([self.scale, self.good_steps, -self.overflow_steps])
        every = torch.zeros((runtime.world_size, 3), device=self.scale.device)
        every[runtime.rank] = mine
        least = sum_over_ranks(every, runtime).amin(dim=0)
        self.scale.copy_(least[0])
        self.good_steps.copy_(least[1])
        self.overflow_steps.copy_(-least[2])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors themselves."""
        return {
            "scale": self.scale,
            "good_steps": self.good_steps,
            "overflow_steps": self.overflow_steps,
        }

    def load_state_dict(self, saved: Mapping[str, Any] | None, runtime: Runtime) -> None:
        """Put back what was saved; all ranks call this.

        Args:
            saved: What ``state_dict`` gave, on rank 0; None begins with the first scale, as does a
                run that goes on from one with another precision.
            runtime: This process.
        """
        mine = self.state_dict()
        for name, value in (saved or {}).items():
            mine[name].copy_(value)
        broadcast_over_ranks(mine.values(), runtime)


@contextmanager
def torch_settings(
    compute: ComputeConfig, device: torch.device, notice: Callable[[str], None]
) -> Iterator[None]:
    """Set what is global in torch as a run needs it; as before at the end of the block.

    Args:
        compute: Section ``compute`` of the configuration.
        device: Where the model computes.
        notice: Receives a line for each operation that is not deterministic, if all are to be.
    """
    with (
        float32_precision(compute.precision),
        deterministic_algorithms(device, notice, enabled=compute.deterministic),
    ):
        yield


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Let products of float32 numbers use TF32 on CUDA, or not; as before at the end of the block.

    torch has two interfaces for this, and reading the older one raises where only the newer one was
    written. Both are written, so that a model and torch's compiler may read either.

    Args:
        precision: ``tf32`` or ``ieee``; any other value changes nothing.
    """
    if precision not in ("tf32", "ieee"):
        yield
        return
    backends: Any = torch.backends
    parts = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    before = [part.fp32_precision for part in parts]
    _write_precisions([precision] * len(parts))
    try:
        yield
    finally:
        _write_precisions(before)


def _write_precisions(precisions: list[str]) -> None:
    """Set TF32 of matrix products, convolutions and recurrent layers in both interfaces."""
    backends: Any = torch.backends
    matmul, conv, rnn = precisions
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please use the new API")  # some releases warn
        backends.cuda.matmul.allow_tf32 = matmul == "tf32"
        backends.cudnn.allow_tf32 = conv == "tf32"
    backends.cuda.matmul.fp32_precision = matmul
    backends.cudnn.conv.fp32_precision = conv
    backends.cudnn.rnn.fp32_precision = rnn
