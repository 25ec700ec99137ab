"""LeNet-5 as the CIFAR-10 study has it (Bikhazi and Cosic): 62,006 parameters with its head."""

from __future__ import annotations

from torch import nn

from kdedge.models.layers import ReLUMaxPool, relu


def lenet5() -> nn.Sequential:
    """C6(5x5)-M-C16(5x5)-M-D120-D84, ReLU throughout: float [batch, 3, 32, 32] to [batch, 84]."""
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 5), ReLUMaxPool(), nn.Conv2d(6, 16, 5), ReLUMaxPool(), nn.Flatten()),
        *(nn.Linear(400, 120), relu(), nn.Linear(120, 84), relu()),
    )


BACKBONES = {"lenet5": lenet5}
