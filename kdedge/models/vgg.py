"""VGG13 and VGG16 with batch norm and the four students of "Teaching assistants over TCN", for 3x32x32 images.

A number is a 3x3 convolution of that many filters (padded by 1) with batch norm and ReLU, M a 2x2 max-pool.
"""

from __future__ import annotations

from torch import nn

from kdedge.models.layers import GlobalMean, convolutions, relu


def vgg(spec: str, dense: int | None) -> nn.Sequential:
    """Convolutions of `spec`, average over what is left of the image, then a linear layer of width `dense` if given.

    Float [batch, 3, 32, 32] to [batch, dense or the last number of filters].
    """
    layers, channels = convolutions(3, spec)
    layers += [GlobalMean(), nn.Flatten()]
    if dense is not None:
        layers.append(nn.Linear(channels, dense))
    return nn.Sequential(*layers)


def vgg13_bn() -> nn.Sequential:
    """The teacher of the CIFAR-10 study (Bikhazi and Cosic), which keeps the classifier for ImageNet: two layers of 4096."""
    wide = [nn.Linear(512, 4096), relu(), nn.Dropout(), nn.Linear(4096, 4096), relu(), nn.Dropout()]
    return nn.Sequential(*vgg("64 64 M 128 128 M 256 256 M 512 512 M 512 512 M", None), *wide)


BACKBONES = {
    "vgg13-bn": vgg13_bn,
    "vgg16-bn": lambda: vgg("64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M", None),
    "vgg-student-1": lambda: vgg("32 32 M 64 64 M 128 128 M 256 256 M 512 M", 512),
    "vgg-student-2": lambda: vgg("32 32 M 64 64 M 128 128 M 256 256 M M", 256),
    "vgg-student-4": lambda: vgg("32 M 32 M 64 64 M 128 128 M 128 128 M", 128),
    "vgg-student-8": lambda: vgg("32 32 M 32 32 M 32 64 M 64 64 M 64 64 64 M", None),
}
