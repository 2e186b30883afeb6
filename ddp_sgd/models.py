"""Models: two small networks by name; any other module by its class_path."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


class MLP(nn.Sequential):
    """Linear layers with ReLU between them.

    Args:
        inputs: Numbers in one sample, at least 1; inputs of shape (m, ...) are flattened to (m,
            inputs).
        hidden: Widths of the hidden layers.
        classes: Width of the output, at least 1.

    Example:
        >>> MLP(inputs=64, hidden=[32], classes=10)(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(self, inputs: int, hidden: Sequence[int], classes: int) -> None:
        widths = [inputs, *hidden, classes]
        layers: list[nn.Module] = [nn.Flatten()]
        for wide, narrow in pairwise(widths):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        super().__init__(*layers[:-1])


class ConvNet(nn.Module):
    """Stages of convolution, ReLU and pooling by two, then the mean over pixels and a linear layer.

    Args:
        channels: Channels of the input; images of shape (m, H, W) are taken as one channel.
        widths: Channels of the stages, each at least 1.
        classes: Width of the output, at least 1.
        batch_norm: Normalize after each convolution.

    Example:
        >>> ConvNet(channels=1, widths=[8, 16], classes=10)(torch.zeros(5, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        widths: Sequence[int] = (32, 64),
        classes: int = 10,
        *,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((channels, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, after, kernel_size=3, padding=1, bias=not batch_norm)]
            layers += [nn.BatchNorm2d(after)] if batch_norm else []
            layers += [nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        self.stages = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images of shape (m, channels, H, W) or (m, H, W) to scores of shape (m, classes)."""
        if images.ndim == 3:
            images = images.unsqueeze(1)
        scores: torch.Tensor = self.head(self.stages(images).mean(dim=(2, 3)))
        return scores
