"""Multi-layer perceptrons on MNIST-sized images: 784-1200-1200 and 784-H."""

from __future__ import annotations

from torch import nn

from kdedge.models.layers import relu


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with a ReLU after each: float [batch, 1, 28, 28] to [batch, widths[-1]]."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in zip((784, *widths), widths, strict=False):
        layers += [nn.Linear(inputs, outputs), relu()]
    return nn.Sequential(*layers)


BACKBONES = {"mlp-1200": lambda: mlp(1200, 1200)}
