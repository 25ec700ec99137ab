"""Which layers of a network round what: each convolution and linear layer its weights, and what computes what it takes.

Onnxruntime computes a layer in integers when its inputs, its weights and what follows it are rounded. ReLU, max-pooling and
flattening may stand between a layer and the rounding: they keep the order of values, so it does not matter which is first.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdedge.models.layers import GlobalMean
from kdedge.models.network import Network
from kdedge.models.resnet import Residual
from kdedge.models.view import LowResolution
from kdedge.quantize.fake import LIMITS, OUTER_BITS, ActivationQuantizer, WeightQuantizer


class QuantizedConv2d(nn.Conv2d):
    """A convolution, with its weights, that rounds what it takes by `given` and its weights to so many bits."""

    def __init__(self, layer: nn.Conv2d, given: nn.Module, bits: int, grid: nn.Module) -> None:
        sizes = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        super().__init__(*sizes, layer.groups, layer.bias is not None, device="meta")  # type: ignore[arg-type]
        self.weight, self.bias = layer.weight, layer.bias
        self.given: nn.Module = given
        self.rounding: nn.Module = WeightQuantizer(bits)
        self.limit, self.grid = LIMITS[bits], (grid,)  # in a tuple, as it belongs to whoever rounds

    def forward(self, x: Tensor) -> Tensor:
        """Float [batch, channels, H, W] to [batch, filters, H', W']."""
        maps: Tensor = self._conv_forward(self.given(x), self.rounding(self.weight), self.bias)
        return maps


class QuantizedLinear(nn.Linear):
    """A linear layer, with its weights, that rounds what it takes by `given` and its weights to so many bits."""

    def __init__(self, layer: nn.Linear, given: nn.Module, bits: int, grid: nn.Module) -> None:
        super().__init__(layer.in_features, layer.out_features, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.given: nn.Module = given
        self.rounding: nn.Module = WeightQuantizer(bits)
        self.limit, self.grid = LIMITS[bits], (grid,)  # in a tuple, as it belongs to whoever rounds

    def forward(self, x: Tensor) -> Tensor:
        """Float [batch, inputs] to [batch, outputs]."""
        return F.linear(self.given(x), self.rounding(self.weight), self.bias)


def quantized_network(network: Network, bits: int, observe_steps: int) -> Network:
    """`network` itself, from now on rounding its weights to so many bits and its activations to 8.

    The head's weights have OUTER_BITS. The members share a dense vector and its range, which is rounded by the head that
    takes it.
    """
    assert isinstance(network.head, nn.Linear)  # an ensemble has several, see rules/quantize.py
    for number, member in enumerate(network.members):
        network.members[number] = quantized_backbone(member, bits, observe_steps)
    given = ActivationQuantizer(observe_steps)
    network.head = QuantizedLinear(network.head, given, OUTER_BITS, given)
    return network


def quantized_backbone(member: nn.Module, bits: int, observe_steps: int) -> nn.Module:
    """A backbone with the same weights that rounds.

    What it takes is not rounded, since pixels are uint8 already, unless they are means of pixels. The weights of its first
    layer have OUTER_BITS, as those of the head: mostly there are few of them, and the code of Polino et al. 2018 leaves both
    layers in full precision in their deepest student.
    """
    return _quantized(member, chain([OUTER_BITS], repeat(bits)), observe_steps, grid=nn.Identity())[0]


def _quantized(
    module: nn.Module, bits: Iterator[int], observe_steps: int, *, grid: nn.Module | None
) -> tuple[nn.Module, nn.Module | None]:
    """The module that takes the place of this one, and on whose grid lies what it gives, if it is rounded, given on whose
    lies what it takes; the grid of pixels is an Identity. `bits` are those of the layers in their order."""
    given = ActivationQuantizer(observe_steps) if grid is None else nn.Identity()
    if isinstance(module, nn.Sequential):
        parts = []
        for part in module:
            part, grid = _quantized(part, bits, observe_steps, grid=grid)
            parts.append(part)
        return nn.Sequential(*parts), grid
    if isinstance(module, nn.Conv2d | nn.Linear):
        layer = QuantizedConv2d if isinstance(module, nn.Conv2d) else QuantizedLinear
        return layer(module, given, next(bits), grid or given), None  # type: ignore[arg-type]
    if isinstance(module, Residual):
        grid = grid or given
        # Both terms of the sum are rounded. An empty shortcut hands on what is.
        layers, shortcut = (
            nn.Sequential(_quantized(branch, bits, observe_steps, grid=grid)[0], ActivationQuantizer(observe_steps))
            for branch in (module.layers, module.shortcut)
        )
        empty = isinstance(module.shortcut, nn.Identity)
        return nn.Sequential(given, Residual(layers, module.shortcut if empty else shortcut)), None
    if isinstance(module, GlobalMean):
        return nn.Sequential(given, module), None
    return module, None if isinstance(module, LowResolution) else grid


def with_rounded_biases(module: nn.Module, pixel_scale: float) -> nn.Module:
    """`module` itself, of rounded weights and without batch norm, with each bias rounded as an int32 of the scale of the
    products that it is added to; `pixel_scale` is the scale of what nothing rounds."""
    for layer in module.modules():
        if isinstance(layer, QuantizedConv2d | QuantizedLinear) and layer.bias is not None:
            (grid,) = layer.grid
            input_scale = grid.grid()[0] if isinstance(grid, ActivationQuantizer) else pixel_scale
            with torch.no_grad():
                scale = layer.weight.abs().flatten(1).amax(1) / layer.limit * input_scale
                layer.bias.copy_(torch.where(scale > 0, torch.round(layer.bias / scale) * scale, layer.bias))
    return module


def weight_limits(module: nn.Module) -> dict[str, int]:
    """By the names of the weights that are rounded, in a network or a part of it, how many steps they have on each side of 0."""
    layers = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedConv2d | QuantizedLinear)
    }
    return {f"{name}.weight".removeprefix("."): layer.limit for name, layer in layers.items()}


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
