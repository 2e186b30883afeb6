"""Stochastic gradient descent with momentum, by one fused call per group."""

import re
import sys
from collections.abc import Callable, Mapping
from itertools import compress
from typing import Any, TypedDict

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ddp_sgd.errors import ConfigError


class ParamGroup(TypedDict):
    """Parameters that decay alike; a dictionary, as in torch.

    Args:
        params: The parameters, in the order of the model.
        weight_decay: Factor of the weight that is added to its gradient.
    """

    params: list[nn.Parameter]
    weight_decay: float


class _Call:
    """What one call of the kernel moves: parameters of one group and one type.

    Args:
        parameters: The parameters.
        momentum_buffers: By parameter; empty without momentum. Entries are
            replaced where a parameter got another memory layout.
        weight_decay: Factor of the weight that is added to its gradient.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        momentum_buffers: dict[nn.Parameter, torch.Tensor],
        weight_decay: float,
    ) -> None:
        self.parameters = parameters
        self.weight_decay = weight_decay
        self._of_parameter = momentum_buffers
        self._is_complex = parameters[0].is_complex()
        self._pointers: list[int] = []
        self.follow_storage()

    def follow_storage(self) -> None:
        """Look the memory of the parameters up again, since a model may replace it.

        ``p.data = ...`` does so, and ``flatten_parameters()`` of a recurrent layer on CUDA.
        """
        pointers = [p.data_ptr() for p in self.parameters]
        if pointers == self._pointers:
            return
        self._pointers = pointers
        self.weights = [self._as_real(p.detach()) for p in self.parameters]
        self.strides = [weight.stride() for weight in self.weights]
        self.momentum_buffers: list[torch.Tensor] = []
        for parameter in self.parameters if self._of_parameter else ():
            momentum_buffer = self._of_parameter[parameter]
            if momentum_buffer.stride() != parameter.stride():
                momentum_buffer = self._of_parameter[parameter] = _in_layout_of(
                    parameter, momentum_buffer
                )
            self.momentum_buffers.append(self._as_real(momentum_buffer))

    def gradients(self) -> list[torch.Tensor | None]:
        """Return the gradient of each parameter, in the parameter's memory layout."""
        found = [p.grad for p in self.parameters]
        if self._is_complex:
            found = [None if g is None else self._as_real(g.resolve_conj()) for g in found]
        if [None if g is None else g.stride() for g in found] == self.strides:
            return found
        return [
            g if g is None or g.stride() == w.stride() else _in_layout_of(w, g)
            for g, w in zip(found, self.weights, strict=True)
        ]

    def _as_real(self, tensor: torch.Tensor) -> torch.Tensor:
        """View complex numbers as pairs: SGD acts on both parts alike."""
        return torch.view_as_real(tensor) if self._is_complex else tensor


def _in_layout_of(tensor: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Copy values into memory that is laid out like a tensor: the kernel walks memory in order."""
    return torch.empty_like(tensor.detach()).copy_(values)


class SGD:
    """Stochastic gradient descent with momentum, by torch's fused kernel.

    With gradient g, weight p, decay d, momentum m and rate lr, a step is

        g <- g + d p;  v <- m v + g;  p <- p - lr (g + m v if nesterov else v)

    so that the rate multiplies the whole momentum buffer, at the step's own rate. Momentum buffers
    begin at zero: the first step is torch's, bit by bit.

    torch.optim.SGD does the same around the same kernel. Making one costs a second and a half,
    since it imports the compiler of torch, and its bookkeeping 60 us per step.

    Args:
        param_groups: Who decays by how much. Parameters may have any memory layout without gaps,
            and their storage may be replaced between steps.
        momentum: m, in [0, 1).
        nesterov: Look one momentum step ahead.
        names: Names of the parameters, for ``state_dict``, in its order; None numbers them.

    Attributes:
        param_groups: The groups.
        momentum: m, which may be set between steps where there are momentum buffers.
        momentum_buffers: v of each parameter; empty without momentum.

    Source:
        The rate multiplies the buffer, as in Sutskever et al. 2013, section 2, in torch's form.
    """

    def __init__(
        self,
        param_groups: list[ParamGroup],
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        names: Mapping[nn.Parameter, str] | None = None,
    ) -> None:
        self.param_groups = param_groups
        parameters = [p for group in param_groups for p in group["params"]]
        self._names = names or {p: str(number) for number, p in enumerate(parameters)}
        self.momentum = momentum
        self._nesterov = nesterov
        self.momentum_buffers: dict[nn.Parameter, torch.Tensor] = (
            {p: torch.zeros_like(p) for p in parameters} if momentum else {}
        )
        self._calls = [call for group in param_groups for call in self._split(group)]

    def state_dict(self) -> dict[str, Any]:
        """Gather what a resume needs, where it is.

        Returns:
            ``momentum_buffer``: the buffers by names of their parameters; empty without momentum.
        """
        buffers = self.momentum_buffers
        return {
            "momentum_buffer": {self._names[p]: buffers[p] for p in self._names if p in buffers}
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put the momentum buffers back; one that was not saved, as without momentum, stays.

        Args:
            state_dict: What ``state_dict`` gave, on any device.
        """
        saved = state_dict["momentum_buffer"]
        for name, buffer in self.state_dict()["momentum_buffer"].items():
            if name in saved:
                buffer.copy_(saved[name])

    def step(self, lr: float | torch.Tensor, skipped: torch.Tensor | None = None) -> None:
        """Move every parameter that has a gradient.

        Args:
            lr: Rate of this step, at least 0; a tensor without dimensions is on the parameters'
                device.
            skipped: float32 tensor without dimensions on the parameters' device; where it is 1,
                everything stays as it is, and nothing waits to find out.
        """
        # The kernel of CUDA refuses 0 where there are buffers; this number times any of them is 0.
        momentum = self.momentum or (sys.float_info.min if self.momentum_buffers else 0.0)
        for call in self._calls:
            call.follow_storage()
            gradients = call.gradients()
            weights, momentum_buffers = call.weights, call.momentum_buffers
            if any(gradient is None for gradient in gradients):
                has = [gradient is not None for gradient in gradients]
                gradients = list(compress(gradients, has))
                weights, momentum_buffers = (
                    list(compress(weights, has)),
                    list(compress(momentum_buffers, has)),
                )
                if not weights:
                    continue
            torch._fused_sgd_(
                weights,
                gradients,  # type: ignore[arg-type]  # none of them is None by now
                momentum_buffers,
                weight_decay=call.weight_decay,
                momentum=momentum,
                lr=lr,  # type: ignore[arg-type]  # it takes both
                dampening=0.0,
                nesterov=self._nesterov,
                maximize=False,
                is_first_step=False,
                found_inf=skipped,
            )

    def _split(self, group: ParamGroup) -> list[_Call]:
        """Split a group by type, since the kernel takes one at a time."""
        types = dict.fromkeys(p.dtype for p in group["params"])
        return [
            _Call(
                [p for p in group["params"] if p.dtype == dtype],
                self.momentum_buffers,
                group["weight_decay"],
            )
            for dtype in types
        ]


class RateTable:
    """Learning rates of a run on the device, a block of steps at a time.

    A graph that repeats a step can only read its rate there. Eager steps read it there as well: by
    a number of Python's the kernel computes in double precision, and the last bit differs.

    Args:
        rate_at: Learning rate of the step with a number.
        steps: Steps of the run.
        device: Where the parameters are.

    Attributes:
        values: float32 of shape (``SIZE``,); the rate of step s is in ``values[s % SIZE]``, for
            steps of the block that was loaded last.
    """

    SIZE = 1024

    def __init__(self, rate_at: Callable[[int], float], steps: int, device: torch.device) -> None:
        self.values = torch.zeros(self.SIZE, device=device)
        self._each = self.values.unbind()
        self._rate_at = rate_at
        self._steps = steps
        self._block = -1

    def load(self, step: int) -> None:
        """Load the block of a step, unless it is there; nothing waits for the device."""
        block = step // self.SIZE
        if block == self._block:
            return
        self._block = block
        end = min((block + 1) * self.SIZE, self._steps)
        rates = torch.tensor([self._rate_at(each) for each in range(block * self.SIZE, end)])
        if self.values.is_cuda:
            rates = rates.pin_memory()
        self.values[: len(rates)].copy_(rates, non_blocking=True)

    def at(self, step: int) -> torch.Tensor:
        """Return the rate of a step, as a tensor without dimensions that lasts for its block."""
        self.load(step)
        return self._each[step % self.SIZE]


def build_sgd(
    model: nn.Module,
    *,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_norm_and_bias: bool = False,
) -> SGD:
    """Make SGD with decay groups.

    Args:
        model: Module whose parameters that require gradients are moved, on their device.
        momentum: m, in [0, 1).
        nesterov: Look one momentum step ahead.
        weight_decay: d, at least 0.
        decay_norm_and_bias: Decay biases and the parameters of normalization layers as well; see
            ``is_norm_or_bias``.

    Raises:
        ConfigError: No parameter requires a gradient.

    Source:
        Who decays: He et al. 2019, arXiv:1812.01187, section 3.1.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ConfigError(
            f"model is {type(model).__name__} without a parameter to train; name a module with "
            "weights that require gradients."
        )
    spared: set[nn.Parameter] = set()
    if weight_decay > 0 and not decay_norm_and_bias:
        spared = {p for module in model.modules() for p in _norm_and_bias(module)}
    groups: list[ParamGroup] = [
        {"params": [p for _, p in named if p not in spared], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p in spared], "weight_decay": 0.0},
    ]
    return SGD(
        [group for group in groups if group["params"]],
        momentum=momentum,
        nesterov=nesterov,
        names={p: name for name, p in named},
    )


def is_norm_or_bias(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a bias, or belongs to a normalization layer.

    Any of these is enough: the module is one of torch's normalization layers or its class is named
    like one (``RMSNorm``, ``LayerNorm2d``); the name of the parameter begins or ends with ``bias``
    (``bias_k``, ``in_proj_bias``); or it has fewer than two dimensions, as scales and biases do.

    Args:
        module: Module that holds the parameter.
        name: Name of the parameter in it.
        parameter: The parameter.
    """
    is_norm = isinstance(module, _NORMS) or bool(_NORM_NAME.search(type(module).__name__))
    is_bias = name.startswith("bias") or name.endswith("bias")
    return is_norm or is_bias or parameter.ndim < 2


_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_NORM_NAME = re.compile(r"Norm(\dd|Act|Act\dd)?$")


def _norm_and_bias(module: nn.Module) -> list[nn.Parameter]:
    parameters = module.named_parameters(recurse=False)
    return [p for name, p in parameters if is_norm_or_bias(module, name, p)]
