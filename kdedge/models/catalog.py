"""What `check` and `plan` need to know of every model, without torch. A test holds it against the built networks.

A model is a backbone that turns an image into a dense vector; the head that turns the dense vector into logits is one
linear layer, added when the network stands alone or heads a group (models/network.py). So the counts below are the
backbone's, and a head adds (dense + 1) * classes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class ModelInfo:
    """Facts about one model: what it sees, the width of its dense vector, and its size."""

    image: Shape
    dense: int  # width of the dense vector, which is the input of the head
    parameters: int  # of the backbone, without a head
    source: str


_TCN = "Malik et al. 2021, Tables 4 and 6"
_TA = "Teaching assistants over TCN, architecture tables"
_SLIDES = "Khetarpaul et al., slides"
_MNIST = (1, 28, 28)
_CIFAR = (3, 32, 32)

MODELS = {
    "tcn-teacher": ModelInfo(_MNIST, 256, 2_378_368, _TCN),
    "tcn-student-1": ModelInfo(_MNIST, 256, 92_080, _TCN),
    "tcn-student-1x": ModelInfo(_MNIST, 256, 185_410, "ours, of the size of two tcn-student-1"),
    "tcn-student-2": ModelInfo(_MNIST, 128, 46_376, _TCN),
    "tcn-student-4": ModelInfo(_MNIST, 64, 22_168, _TCN),
    "tcn-student-8": ModelInfo(_MNIST, 32, 4_995, "ours, of the 5.00k that Malik et al. 2021, Table 6, print"),
    "tcn-student-4x": ModelInfo(_MNIST, 64, 85_744, _TCN),
    "kd-student": ModelInfo(_MNIST, 256, 92_080, _TCN),
    "compact-4": ModelInfo(_MNIST, 288, 17_664, "ours, C8-M-C16-C16-M-C32-C32-M"),
    "edge-4": ModelInfo(_MNIST, 640, 11_760, "ours, C12k5s2-C24s2-C40s2"),
    "compact-8": ModelInfo(_MNIST, 32, 4_928, "ours, C8-M-C12-M-C16-M-D12-D32"),
    "compact-teacher": ModelInfo(_MNIST, 1152, 278_016, "ours, C32-M-C64-C64-M-C128-C128-M"),
    "mlp-1200": ModelInfo(_MNIST, 1200, 2_383_200, "784-1200-1200, Hinton et al. 2015, section 3"),
    "lenet5": ModelInfo(_CIFAR, 84, 61_156, "LeNet of the CIFAR-10 study (Bikhazi and Cosic)"),
    "vgg13-bn": ModelInfo(_CIFAR, 4096, 28_293_440, "teacher of the CIFAR-10 study (Bikhazi and Cosic)"),
    "vgg16-bn": ModelInfo(_CIFAR, 512, 14_723_136, _TA),
    "vgg-student-1": ModelInfo(_CIFAR, 512, 2_618_016, _TA),
    "vgg-student-2": ModelInfo(_CIFAR, 256, 1_239_968, _TA),
    "vgg-student-4": ModelInfo(_CIFAR, 128, 600_096, _TA),
    "vgg-student-8": ModelInfo(_CIFAR, 64, 242_112, _TA),
    "resnet50": ModelInfo(_CIFAR, 2048, 23_500_352, f"ResNet-50, {_SLIDES}"),
}

_MAPS = {  # channels x side of what conv1, conv2 and so on give
    "tcn-teacher": "32x26 64x12",
    "tcn-student-1": "64x26 16x12",
    "tcn-student-1x": "64x26 34x12",
    "tcn-student-2": "64x26 8x12",
    "tcn-student-4": "32x26 8x12",
    "tcn-student-8": "8x26 5x12",
    "tcn-student-4x": "64x26 16x12",
    "kd-student": "64x26 16x12",
    "compact-4": "8x14 16x14 16x7 32x7 32x3",
    "edge-4": "12x14 24x7 40x4",
    "compact-8": "8x14 12x7 16x3",
    "compact-teacher": "32x14 64x14 64x7 128x7 128x3",
    "lenet5": "6x14 16x5",
    "vgg13-bn": "64x32 64x16 128x16 128x8 256x8 256x4 512x4 512x2 512x2 512x1",
    "vgg16-bn": "64x32 64x16 128x16 128x8 256x8 256x8 256x4 512x4 512x4 512x2 512x2 512x2 512x1",
    "vgg-student-1": "32x32 32x16 64x16 64x8 128x8 128x4 256x4 256x2 512x1",
    "vgg-student-2": "32x32 32x16 64x16 64x8 128x8 128x4 256x4 256x1",
    "vgg-student-4": "32x16 32x8 64x8 64x4 128x4 128x2 128x2 128x1",
    "vgg-student-8": "32x32 32x16 32x16 32x8 32x8 64x4 64x4 64x2 64x2 64x2 64x1",
}

FAMILIES = {  # how the names of their models are written, and one of each
    "mlp-H": "mlp-300",
    "resnet-A-B-C-D": "resnet-1-1-1-1",
    "resnet-A-B-C-D-sN": "resnet-1-1-1-1-s2",
}

MAX_HIDDEN = 65_536  # a wider layer is a typing mistake, not a small network


def find(name: str) -> ModelInfo | None:
    """Facts about the model `name`, or None when there is no such model.

    `mlp-H` stands for 784-H, H from 1 to 65,536. `resnet-A-B-C-D` has A residual blocks of 64 channels, then B of 128, C of
    256 and D of 512, each from 0 to 9 and not all 0; `-s2` or `-s4` is the stride of its first convolution, else 1.
    """
    if name in MODELS:
        return MODELS[name]
    if (hidden := mlp_hidden(name)) is not None:
        return ModelInfo(_MNIST, hidden, 785 * hidden, f"784-H, {_SLIDES}")
    if (blocks := resnet_blocks(name)) is not None:
        return _resnet(blocks[0])
    return None


def layers(name: str) -> dict[str, Shape]:
    """The layers of a model that give maps, by name, and the shape of their maps: convolutions, and residual blocks.

    Each is meant with all that follows it, such as batch norm, ReLU and pooling, up to the next one. There are none in an
    MLP, and none are known of a model that does not exist.
    """
    if name == "resnet50":
        return _residual((3, 4, 6, 3), 1, expansion=4)
    if (blocks := resnet_blocks(name)) is not None:
        return _residual(*blocks)
    sizes = [tuple(map(int, size.split("x"))) for size in _MAPS.get(name, "").split()]
    return {f"conv{n}": (channels, side, side) for n, (channels, side) in enumerate(sizes, 1)}


def mlp_hidden(name: str) -> int | None:
    """The hidden width H of a model called `mlp-H`, or None for every other name (mlp-1200 is a model of its own)."""
    match = re.fullmatch(r"mlp-([1-9][0-9]{0,4})", name)
    if match is None or name in MODELS or int(match[1]) > MAX_HIDDEN:
        return None
    return int(match[1])


def resnet_blocks(name: str) -> tuple[tuple[int, ...], int] | None:
    """The blocks of each stage and the first stride of a model called `resnet-A-B-C-D`, or None for every other name."""
    match = re.fullmatch(r"resnet-([0-9])-([0-9])-([0-9])-([0-9])(-s[24])?", name)
    if match is None or not any(blocks := tuple(map(int, match.groups()[:4]))):
        return None
    return blocks, int(match[5][2:]) if match[5] else 1


def _resnet(blocks: tuple[int, ...]) -> ModelInfo:
    """Two 3x3 convolutions a block, a 1x1 one around it where the channels change; batch norm has two values a channel."""
    channels, parameters = 64, 9 * 3 * 64 + 2 * 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for _ in range(count):
            shortcut = (channels + 2) * width if channels != width else 0
            parameters += (9 * channels + 2) * width + (9 * width + 2) * width + shortcut
            channels = width
    return ModelInfo(_CIFAR, channels, parameters, f"ResNet of basic blocks, {_SLIDES}")


def _residual(blocks: tuple[int, ...], stem_stride: int, expansion: int = 1) -> dict[str, Shape]:
    """conv1 with its max-pool, and block1, block2 and so on; each stage but the first begins with a stride of 2."""
    side = 16 // stem_stride
    layers: dict[str, Shape] = {"conv1": (64, side, side)}
    for stage, count in enumerate(blocks):
        side = (side + 1) // 2 if stage and count else side
        for _ in range(count):
            layers[f"block{len(layers)}"] = ((64 << stage) * expansion, side, side)
    return layers


def names(image: Shape | None = None) -> list[str]:
    """The names to suggest and to list, a family's as a pattern; with `image`, of those that see images of that shape."""
    models = {**MODELS, **{pattern: find(one) for pattern, one in FAMILIES.items()}}
    return [name for name, info in models.items() if info and image in (None, info.image)]
