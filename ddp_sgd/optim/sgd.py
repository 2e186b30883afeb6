"""Stochastic gradient descent: who decays, and at which rate."""

import torch
from torch import nn
from torch.optim import SGD

from ddp_sgd.errors import ConfigError


def build_sgd(
    model: nn.Module,
    *,
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay_norm_and_bias: bool = False,
) -> SGD:
    """Make torch's SGD with decay groups.

    With gradient g, weight p, decay d, momentum m and rate lr, a step is

        g <- g + d p;  v <- m v + g;  p <- p - lr (g + m v if nesterov else v)

    so that the rate multiplies the whole velocity, at the step's own rate.

    Args:
        model: Module whose parameters that require gradients are moved, on their device.
        lr: Rate of the first step, at least 0.
        momentum: m, in [0, 1).
        nesterov: Look one momentum step ahead.
        weight_decay: d, at least 0.
        decay_norm_and_bias: Decay parameters with fewer than two dimensions as well, that is biases
            and the scales of normalization layers.

    Returns:
        A fused optimizer: one kernel for all parameters, which leaves everything as it is where its
        ``found_inf`` is 1.

    Raises:
        ConfigError: No parameter requires a gradient.

    Source:
        The rate multiplies the velocity, as in Sutskever et al. 2013, section 2, in torch's form;
        who decays: He et al. 2019, arXiv:1812.01187, section 3.1.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError(
            f"model is {type(model).__name__} without a parameter to train; name a module with "
            "weights that require gradients."
        )
    spared = [] if decay_norm_and_bias else [p for p in parameters if p.ndim < 2]
    decayed = parameters if decay_norm_and_bias else [p for p in parameters if p.ndim >= 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((decayed, weight_decay), (spared, 0.0))
        if group
    ]
    optimizer = SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    if momentum:
        _start_at_rest(optimizer)
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def _start_at_rest(optimizer: SGD) -> None:
    """Begin with a velocity of zero.

    The first step is the same, bit by bit; but if it is skipped, torch would leave its velocity as
    uninitialized memory.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
