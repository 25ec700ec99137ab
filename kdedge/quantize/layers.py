"""Which layers of a network round what: each convolution and linear layer its weights, and what computes what it takes.

Onnxruntime computes a layer in integers when its inputs, its weights and what follows it are rounded. ReLU, max-pooling and
flattening may stand between a layer and the rounding: they keep the order of values, so it does not matter which is first.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdedge.models.layers import GlobalMean
from kdedge.models.network import Network
from kdedge.models.resnet import Residual
from kdedge.models.view import LowResolution
from kdedge.quantize.fake import ActivationQuantizer, WeightQuantizer


class QuantizedConv2d(nn.Conv2d):
    """A convolution, with its weights, that rounds what it takes by `given` and its weights to so many bits."""

    def __init__(self, layer: nn.Conv2d, given: nn.Module, bits: int) -> None:
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        super().__init__(*sizes, layer.groups, layer.bias is not None, device="meta")  # type: ignore[arg-type]
        self.weight, self.bias = layer.weight, layer.bias
        self.given: nn.Module = given
        self.rounding: nn.Module = WeightQuantizer(bits)

    def forward(self, x: Tensor) -> Tensor:
        """Float [batch, channels, H, W] to [batch, filters, H', W']."""
        maps: Tensor = self._conv_forward(self.given(x), self.rounding(self.weight), self.bias)
        return maps


class QuantizedLinear(nn.Linear):
    """A linear layer, with its weights, that rounds what it takes by `given` and its weights to so many bits."""

    def __init__(self, layer: nn.Linear, given: nn.Module, bits: int) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.given: nn.Module = given
        self.rounding: nn.Module = WeightQuantizer(bits)

    def forward(self, x: Tensor) -> Tensor:
        """Float [batch, inputs] to [batch, outputs]."""
        return F.linear(self.given(x), self.rounding(self.weight), self.bias)


def quantized_network(network: Network, bits: int, observe_steps: int) -> Network:
    """`network` itself, from now on rounding its weights to so many bits and its activations to 8.

    The members share a dense vector and its range, which is rounded by the head that takes it.
    """
    assert isinstance(network.head, nn.Linear)  # an ensemble has several, see rules/quantize.py
    for number, member in enumerate(network.members):
        network.members[number] = quantized_backbone(member, bits, observe_steps)
    network.head = QuantizedLinear(network.head, ActivationQuantizer(observe_steps), bits)
    return network


def quantized_backbone(member: nn.Module, bits: int, observe_steps: int) -> nn.Module:
    """A backbone, or a branch of one, with the same weights, that rounds.

    What it takes is not rounded, since pixels are uint8 already, unless they are means of pixels.
    """
    return _quantized(member, bits, observe_steps, rounded=True)[0]


def _quantized(module: nn.Module, bits: int, observe_steps: int, *, rounded: bool) -> tuple[nn.Module, bool]:
    """The module that takes the place of this one, and whether what it gives is rounded, given whether what it takes is."""
    given = nn.Identity() if rounded else ActivationQuantizer(observe_steps)
    if isinstance(module, nn.Sequential):
        parts = []
        for part in module:
            part, rounded = _quantized(part, bits, observe_steps, rounded=rounded)
            parts.append(part)
        return nn.Sequential(*parts), rounded
    if isinstance(module, nn.Conv2d):
        return QuantizedConv2d(module, given, bits), False
    if isinstance(module, nn.Linear):
        return QuantizedLinear(module, given, bits), False
    if isinstance(module, Residual):
        # Both terms of the sum are rounded. An empty shortcut hands on what is.
        layers, shortcut = (
            nn.Sequential(quantized_backbone(branch, bits, observe_steps), ActivationQuantizer(observe_steps))
            for branch in (module.layers, module.shortcut)
        )
        empty = isinstance(module.shortcut, nn.Identity)
        return nn.Sequential(given, Residual(layers, module.shortcut if empty else shortcut)), False
    if isinstance(module, GlobalMean):
        return nn.Sequential(given, module), False
    return module, rounded and not isinstance(module, LowResolution)


def rounded(module: nn.Module) -> nn.Module:
    """A copy of a quantized network, or of a part of it, whose weights are the rounded ones."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, QuantizedConv2d | QuantizedLinear):
            with torch.no_grad():
                layer.weight.copy_(layer.rounding(layer.weight))
            layer.rounding = nn.Identity()
    return module


def in_float(module: nn.Module) -> nn.Module:
    """A copy of a quantized network, or of a part of it, that rounds nothing."""
    module = copy.deepcopy(module)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, ActivationQuantizer | WeightQuantizer):
                setattr(parent, name, nn.Identity())
    return module
