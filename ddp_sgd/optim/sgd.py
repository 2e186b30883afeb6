"""Stochastic gradient descent: who decays, and at which rate."""

from dataclasses import dataclass
from itertools import compress

import torch
from torch import nn

from ddp_sgd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that decay alike.

    Args:
        parameters: The parameters, in the order of the model.
        weight_decay: Factor of the weight that is added to its gradient.
    """

    parameters: list[nn.Parameter]
    weight_decay: float


@dataclass(frozen=True, slots=True)
class _Call:
    """What one call of the kernel moves: parameters of one group and one type."""

    parameters: list[nn.Parameter]
    weights: list[torch.Tensor]
    velocities: list[torch.Tensor]
    weight_decay: float


class SGD:
    """Stochastic gradient descent with momentum, by torch's fused kernel.

    With gradient g, weight p, decay d, momentum m and rate lr, a step is

        g <- g + d p;  v <- m v + g;  p <- p - lr (g + m v if nesterov else v)

    so that the rate multiplies the whole velocity, at the step's own rate. Velocities begin at
    zero: the first step is torch's, bit by bit.

    torch.optim.SGD does the same around the same kernel. Making one costs a second and a half,
    since it imports the compiler of torch, and its bookkeeping 60 us a step.

    Args:
        groups: Who decays by how much.
        momentum: m, in [0, 1).
        nesterov: Look one momentum step ahead.

    Attributes:
        velocities: v of each parameter; empty without momentum.

    Source:
        The rate multiplies the velocity, as in Sutskever et al. 2013, section 2, in torch's form.
    """

    def __init__(
        self, groups: list[Group], *, momentum: float = 0.0, nesterov: bool = False
    ) -> None:
        self.groups = groups
        self._momentum = momentum
        self._nesterov = nesterov
        self.velocities: dict[nn.Parameter, torch.Tensor] = (
            {p: torch.zeros_like(p) for group in groups for p in group.parameters}
            if momentum
            else {}
        )
        self._calls = [call for group in groups for call in self._split(group)]

    def step(self, lr: float, skipped: torch.Tensor | None = None) -> None:
        """Move every parameter that has a gradient.

        Args:
            lr: Rate of this step, at least 0.
            skipped: float32 tensor without dimensions on the parameters' device; where it is 1,
                everything stays as it is, and nothing waits to find out.
        """
        for call in self._calls:
            gradients = [p.grad for p in call.parameters]
            weights, velocities = call.weights, call.velocities
            if any(gradient is None for gradient in gradients):
                has = [gradient is not None for gradient in gradients]
                gradients = list(compress(gradients, has))
                weights, velocities = list(compress(weights, has)), list(compress(velocities, has))
                if not weights:
                    continue
            torch._fused_sgd_(
                weights,
                gradients,  # type: ignore[arg-type]  # none of them is None by now
                velocities,
                weight_decay=call.weight_decay,
                momentum=self._momentum,
                lr=lr,
                dampening=0.0,
                nesterov=self._nesterov,
                maximize=False,
                is_first_step=False,
                found_inf=skipped,
            )

    def _split(self, group: Group) -> list[_Call]:
        """Split a group by type, since the kernel takes one at a time."""
        types = dict.fromkeys(p.dtype for p in group.parameters)
        return [
            _Call(
                parameters := [p for p in group.parameters if p.dtype == dtype],
                [p.detach() for p in parameters],
                [self.velocities[p] for p in parameters] if self.velocities else [],
                group.weight_decay,
            )
            for dtype in types
        ]


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
        decay_norm_and_bias: Decay parameters with fewer than two dimensions as well, that is biases
            and the scales of normalization layers.

    Raises:
        ConfigError: No parameter requires a gradient.

    Source:
        Who decays: He et al. 2019, arXiv:1812.01187, section 3.1.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError(
            f"model is {type(model).__name__} without a parameter to train; name a module with "
            "weights that require gradients."
        )
    if weight_decay == 0 or decay_norm_and_bias:
        groups = [Group(parameters, weight_decay)]
    else:
        groups = [
            Group([p for p in parameters if p.ndim >= 2], weight_decay),
            Group([p for p in parameters if p.ndim < 2], 0.0),
        ]
    return SGD(
        [group for group in groups if group.parameters], momentum=momentum, nesterov=nesterov
    )
