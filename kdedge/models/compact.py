"""Small convolutional networks with batch norm, which train fast on a CPU: ours, of no paper.

Within the size of four students of the TCN paper (91,242 parameters and 12.54 MFLOP in all), they put their filters
where the image is small. C8 is a 3x3 convolution of 8 filters (padded by 1) with batch norm and ReLU, k5 makes it 5x5 (padded by
2), s2 its stride 2; M is a 2x2 max-pool.
"""

from __future__ import annotations

from torch import nn

from kdedge.models.layers import convolutions, relu


def compact(spec: str) -> nn.Sequential:
    """Convolutions of `spec`, flattened, so that the head sees where on the garment a feature is.

    Float [batch, 1, 28, 28] to [batch, filters * H * W]. No hidden layer follows: the head is linear, and two linear
    layers one after another can do no more than one.
    """
    layers, _ = convolutions(1, spec)
    return nn.Sequential(*layers, nn.Flatten())


def compact_for_dense(spec: str, hidden: int, dense: int) -> nn.Sequential:
    """The same and a D`hidden` with ReLU and a D`dense` after them, for the chunk of a dense vector: to [batch, dense]."""
    layers, channels = convolutions(1, spec)
    side = 28 // 2 ** spec.split().count("M")  # which halves it; there are no strides here
    flat = [nn.Flatten(), nn.Linear(channels * side * side, hidden), relu(), nn.Linear(hidden, dense)]
    return nn.Sequential(*layers, *flat)


BACKBONES = {
    "compact-4": lambda: compact("8 M 16 16 M 32 32 M"),  # C8-M-C16-C16-M-C32-C32-M, one of four
    "edge-4": lambda: compact("12k5s2 24s2 40s2"),  # one of four
    "compact-8": lambda: compact_for_dense("8 M 12 M 16 M", 12, 32),  # C8-M-C12-M-C16-M-D12-D32, one of eight
    "compact-teacher": lambda: compact("32 M 64 64 M 128 128 M"),  # for them to learn from, in minutes
}
