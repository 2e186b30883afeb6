"""The network that torchvision has, for small images."""

from torch import nn
from torchvision.models import resnet18


def resnet18_for_32x32() -> nn.Module:
    """Build ResNet-18 with a first convolution of 3 x 3, stride 1, and no pooling after it.

    Source:
        He et al. 2016, arXiv:1512.03385, with the stem that is usual for CIFAR-10.
    """
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model
