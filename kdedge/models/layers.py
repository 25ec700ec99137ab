"""Layers that several families share."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReLUMaxPool(nn.Module):
    """ReLU and 2x2 max-pooling, in the order that suits the moment; the two commute, so the result is the same.

    In training, pooling first leaves the ReLU a quarter of the work. In a deployed graph the ReLU must follow its
    convolution, where int8 runtimes absorb it into the convolution's output range.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Float [batch, channels, H, W] to [batch, channels, H // 2, W // 2]."""
        if torch.onnx.is_in_onnx_export():
            return F.max_pool2d(F.relu(x), 2)
        return F.relu(F.max_pool2d(x, 2), inplace=True)


class GlobalMean(nn.Module):
    """The mean over the image, as a pooling of its size: that one int8 runtimes have, a mean over axes they have not."""

    def forward(self, x: Tensor) -> Tensor:
        """Float [batch, channels, H, W] to [batch, channels, 1, 1]."""
        return F.avg_pool2d(x, (x.shape[2], x.shape[3]))


def relu() -> nn.ReLU:
    """ReLU that overwrites its input: no layer of ours needs the values before it, and memory is what limits a CPU."""
    return nn.ReLU(inplace=True)


def convolutions(channels: int, spec: str) -> tuple[list[nn.Module], int]:
    """The layers that `spec` names for an image of so many channels, and the channels that come out.

    16 is a 3x3 convolution of 16 filters with batch norm and ReLU, 16k5 one of 5x5, 16s2 one of stride 2; each is padded by half
    its size. M is a 2x2 max-pool.
    """
    layers: list[nn.Module] = []
    tokens = spec.split()
    for token, following in zip(tokens, [*tokens[1:], ""], strict=True):
        if token == "M":
            layers.append(ReLUMaxPool() if layers and isinstance(layers[-1], nn.BatchNorm2d) else nn.MaxPool2d(2))
            continue
        filters, size, stride = _convolution(token)
        layers += [nn.Conv2d(channels, filters, size, stride, size // 2), nn.BatchNorm2d(filters)]
        if following != "M":
            layers.append(relu())
        channels = filters
    return layers, channels


def _convolution(token: str) -> tuple[int, int, int]:
    """Filters, size and stride of one convolution of a spec."""
    found = re.fullmatch(r"(\d+)(?:k(\d+))?(?:s(\d+))?", token)
    assert found is not None, f"{token!r} is neither M nor a convolution like 16, 16k5, 16s2 or 16k5s2"
    return int(found[1]), int(found[2] or 3), int(found[3] or 1)
