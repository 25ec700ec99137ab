"""Exact rewritings of a network for the device: the same logits from fewer and larger layers.

A member's last linear layer and its slice of the head are one linear map. Siblings that are built alike go side by side in
one chain: their first layers see the same image, so they are one layer with the filters of all; each layer after it is
one with a group for each sibling. How far that pays is another matter in float32 than in int8: `for_float32`, `for_int8`. What it
gains is in docs/lab-notes.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdedge.models.layers import GlobalMean, ReLUMaxPool
from kdedge.models.network import Network, in_order, linear
from kdedge.models.view import Centre, LowResolution

Layers = Sequence[nn.Module]  # of one member, in the order in which an image goes through them

# What these do to a channel depends on that channel alone, so they are the same for the channels of several siblings. Types
# are compared exactly: a subclass may compute something else.
_BY_CHANNEL = (nn.ReLU, nn.MaxPool2d, ReLUMaxPool, GlobalMean, nn.Dropout, nn.Identity, LowResolution, Centre)

_OF_ALL = ("kernel_size", "stride", "padding", "dilation", "padding_mode")  # one for all filters of a convolution


# In float32 onnxruntime keeps channels in blocks of 8 (AVX2) or 16 (AVX-512), and leaves that layout for convolutions whose groups do
# not fill them. One file is for both, so a group fills 16: that forgoes 8% of tcn4's time on AVX2, not to lose 37% on AVX-512.
BLOCK = 16

# In int8 it computes a convolution of so many filters or more without a copy of the image's patches, but not in groups.
DIRECT_FILTERS = 16


def for_float32(layers: Layers) -> int:
    """How many layers siblings share in float32: all, or none where that costs the fast layout."""
    return len(layers) if all(layer.out_channels % BLOCK == 0 for _, layer in _in_groups(layers)) else 0


def for_int8(layers: Layers) -> int:
    """How many layers siblings share in int8: those before the first wide convolution in groups."""
    return next((n for n, layer in _in_groups(layers) if layer.out_channels >= DIRECT_FILTERS), len(layers))


def _in_groups(layers: Layers) -> list[tuple[int, nn.Conv2d]]:
    """The convolutions that would have a group for each sibling, and where they are: all after the first layer that learns."""
    learning = [(number, layer) for number, layer in enumerate(layers) if _learns(layer)]
    return [(number, layer) for number, layer in learning[1:] if isinstance(layer, nn.Conv2d)]


def rewritten(network: Network, example: Tensor, shared_layers: Callable[[Layers], int]) -> Network:
    """A network with one linear head as one that gives the same logits but for rounding; its dense vector is another.

    `network` is in eval mode; `example` are images as it takes them, float [batch, C, H, W]. `shared_layers` says how many of
    its layers a member shares with its siblings: those before one of its convolutions, or all.
    """
    assert isinstance(network.head, nn.Linear)
    with torch.no_grad():
        widths = [member(example).shape[1] for member in network.members]
    folded = [
        _fold(in_order(member), weight)
        for member, weight in zip(network.members, torch.split(network.head.weight.detach(), widths, 1), strict=True)
    ]
    alike: dict[str, list[int]] = defaultdict(list)  # the text of a module tells all its settings
    for number, (layers, _, _) in enumerate(folded):
        alike[repr(layers)].append(number)
    members = [
        chain for numbers in alike.values() for chain in _chained([folded[n][0] for n in numbers], shared_layers)
    ]
    weights = [folded[number][1] for numbers in alike.values() for number in numbers]
    bias = network.head.bias.detach().double() + sum(bias for _, _, bias in folded)
    return Network(members, linear(torch.cat(weights, 1).float(), bias.float())).train(network.training)


def _fold(layers: Layers, weight: Tensor) -> tuple[Layers, Tensor, Tensor]:
    """A member without its last linear layer, and what its slice of the head, [classes, width], becomes: weight and bias.

    Where the two layers are smaller than the one that they make, which a narrow layer may be, they are left as they are.
    """
    last, weight = layers[-1], weight.double()
    unfolded = layers, weight, torch.zeros(len(weight), dtype=torch.double)
    if type(last) is not nn.Linear or last.bias is None:
        return unfolded
    if last.in_features * len(weight) > last.weight.numel() + weight.numel():
        return unfolded
    return layers[:-1], weight @ last.weight.detach().double(), weight @ last.bias.detach().double()


def _chained(siblings: Sequence[Layers], shared_layers: Callable[[Layers], int]) -> list[nn.Module]:
    """Members that are built alike as one; each by itself where there is one alone, or with layers that are not known here."""
    layers = siblings[0]
    shared = shared_layers(layers) if len(siblings) > 1 and all(map(_can_be_joined, layers)) else 0
    assert shared in (0, len(layers)) or isinstance(layers[shared], nn.Conv2d)  # a flat image cannot be parted
    together: list[nn.Module] = []
    groups = 1  # until the first layer that learns, all siblings have the same image
    for alike in zip(*(sibling[:shared] for sibling in siblings), strict=True):
        together.append(_as_one(alike, groups))
        if _learns(alike[0]):
            groups = len(siblings)
    if groups == 1:  # nothing is shared, or nothing that learns
        return [nn.Sequential(*sibling) for sibling in siblings]
    if shared == len(layers):
        return [nn.Sequential(*together, nn.Flatten())]
    return [Branches(nn.Sequential(*together), [nn.Sequential(*sibling[shared:]) for sibling in siblings])]


def _learns(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d | nn.Linear)


def _can_be_joined(layer: nn.Module) -> bool:
    if type(layer) is nn.Conv2d:
        return layer.groups == 1
    return type(layer) in (nn.Linear, nn.BatchNorm2d, nn.Flatten, *_BY_CHANNEL)


def _as_one(layers: Layers, groups: int) -> nn.Module:
    """The same layer of each sibling as one: on the image that all see, or with a group each on their own channels."""
    first, n = layers[0], len(layers)
    joined: nn.Module
    if isinstance(first, nn.Conv2d):
        alike: dict[str, Any] = {name: getattr(first, name) for name in _OF_ALL}
        channels = first.in_channels * groups, first.out_channels * n
        joined = nn.Conv2d(*channels, groups=groups, bias=first.bias is not None, **alike)
    elif isinstance(first, nn.Linear):
        channels = first.in_features * groups, first.out_features * n
        joined = nn.Conv2d(*channels, 1, groups=groups, bias=first.bias is not None)
    elif isinstance(first, nn.BatchNorm2d):
        joined = nn.BatchNorm2d(first.num_features * n, first.eps)
    else:
        return Pixel() if isinstance(first, nn.Flatten) else first
    for name, tensor in joined.state_dict().items():
        if tensor.ndim:  # batch norm's count of batches is not needed
            parts = [layer.state_dict()[name] for layer in layers]
            tensor.copy_(torch.cat(parts).view_as(tensor))
    return joined


class Pixel(nn.Module):
    """Flattens an image to one pixel of many channels, so that the linear layers that follow are 1x1 convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        """Float [batch, channels, H, W] to [batch, channels * H * W, 1, 1]; the siblings' channels stay apart."""
        return x.reshape(x.shape[0], -1, 1, 1)


class Branches(nn.Module):
    """Layers that siblings have in one, and then those of each on its own part of the channels."""

    def __init__(self, together: nn.Module, apart: Sequence[nn.Module]) -> None:
        super().__init__()
        self.together = together
        self.apart = nn.ModuleList(apart)

    def forward(self, images: Tensor) -> Tensor:
        """Float [batch, C, H, W] to what all branches give, float [batch, width of all]."""
        parts = self.together(images).chunk(len(self.apart), 1)
        return torch.cat([branch(part) for branch, part in zip(self.apart, parts, strict=True)], 1)
