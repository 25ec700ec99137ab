"""Layers that several families share."""

from __future__ import annotations

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


def relu() -> nn.ReLU:
    """ReLU that overwrites its input: no layer of ours needs the values before it, and memory is what limits a CPU."""
    return nn.ReLU(inplace=True)
