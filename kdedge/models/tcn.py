"""The networks of the Teacher-Class Network paper (Malik et al. 2021) for MNIST and Fashion-MNIST.

C32 is a 3x3 convolution of 32 filters without padding, M a 2x2 max-pool, D64 a linear layer. The paper prints only
parameters and FLOPs; the layers were rebuilt from both, and both match exactly.
"""

from __future__ import annotations

from torch import nn

from kdedge.models.layers import ReLUMaxPool, relu


def tcn(first: int, second: int, hidden: int | None, dense: int, *, relu_dense: bool = False) -> nn.Sequential:
    """C`first`-C`second`-M-D`hidden`-D`dense`: float [batch, 1, 28, 28] to [batch, dense].

    Students end in a linear layer, as the FLOP counts of Table 6 have it; the teacher and the KD student in a ReLU.
    """
    flat = second * 12 * 12
    layers = [nn.Conv2d(1, first, 3), relu(), nn.Conv2d(first, second, 3), ReLUMaxPool(), nn.Flatten()]
    if hidden is not None:
        layers += [nn.Linear(flat, hidden), relu()]
        flat = hidden
    layers.append(nn.Linear(flat, dense))
    if relu_dense:
        layers.append(relu())
    return nn.Sequential(*layers)


BACKBONES = {
    "tcn-teacher": lambda: tcn(32, 64, None, 256, relu_dense=True),
    "tcn-student-1": lambda: tcn(64, 16, 32, 256),
    "tcn-student-1x": lambda: tcn(64, 34, 32, 256),  # ours: of the size of two tcn-student-1
    "tcn-student-2": lambda: tcn(64, 8, 32, 128),
    "tcn-student-4": lambda: tcn(32, 8, 16, 64),
    "tcn-student-8": lambda: tcn(8, 5, 6, 32),  # our choice: the paper prints 5.00k and its layers cannot be recovered
    "tcn-student-4x": lambda: tcn(64, 16, 32, 64),
    "kd-student": lambda: tcn(64, 16, 32, 256, relu_dense=True),
}
