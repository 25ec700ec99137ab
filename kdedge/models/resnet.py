"""Residual networks for 3x32x32 images (He et al. 2016): ResNet-50, and small ones by their numbers of blocks.

The slides' networks (Khetarpaul et al.) have torchvision's layers with a first convolution of 3x3 and stride 1. The
max-pool after it is kept. A stage of no blocks is left out here, and the next one goes on from the stage before.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kdedge.models.layers import GlobalMean, relu


class Residual(nn.Module):
    """ReLU of the sum of what the layers give and a shortcut around them."""

    def __init__(self, layers: nn.Sequential, shortcut: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Float [batch, channels, H, W] to [batch, the layers' channels, H / stride, W / stride]."""
        return F.relu(self.layers(x) + self.shortcut(x), inplace=True)


def resnet(blocks: Sequence[int], stem_stride: int = 1, *, bottleneck: bool = False) -> nn.Sequential:
    """Stages of so many blocks, of 64, 128, 256 and 512 channels: float [batch, 3, 32, 32] to [batch, channels].

    Each stage but the first begins with a stride of 2. With `bottleneck` a block gives four times as many channels.
    """
    layers = [*_convolution(3, 64, 3, stem_stride), relu(), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate(blocks):
        for number in range(count):
            block = _bottleneck if bottleneck else _basic
            layers.append(block(channels, width := 64 << stage, 2 if stage and not number else 1))
            channels = 4 * width if bottleneck else width
    return nn.Sequential(*layers, GlobalMean(), nn.Flatten())


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution without bias, since batch norm, which follows it, has one."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def _basic(inputs: int, width: int, stride: int) -> Residual:
    layers = [*_convolution(inputs, width, 3, stride), relu(), *_convolution(width, width, 3)]
    return Residual(nn.Sequential(*layers), _shortcut(inputs, width, stride))


def _bottleneck(inputs: int, width: int, stride: int) -> Residual:
    layers = [*_convolution(inputs, width, 1), relu(), *_convolution(width, width, 3, stride), relu()]
    layers += _convolution(width, 4 * width, 1)
    return Residual(nn.Sequential(*layers), _shortcut(inputs, 4 * width, stride))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if (inputs, stride) == (outputs, 1):
        return nn.Identity()
    return nn.Sequential(*_convolution(inputs, outputs, 1, stride))


BACKBONES = {"resnet50": lambda: resnet((3, 4, 6, 3), bottleneck=True)}
