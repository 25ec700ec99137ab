"""Networks of the catalogue with random weights and random statistics of their batch norms, and images for them; and
groups of networks whose layers are random as well."""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from exporters.float32 import PixelScale
from kdedge.data.batches import normalise, pixel_scale
from kdedge.data.catalog import DATASETS, DatasetInfo
from kdedge.models.catalog import find
from kdedge.models.layers import GlobalMean, ReLUMaxPool
from kdedge.models.network import Network, build
from kdedge.models.view import Centre, LowResolution

INFO = {(1, 28, 28): DATASETS["fashion-mnist"], (3, 32, 32): DATASETS["cifar10"]}


def network(*models: str, seed: int = 0) -> Network:
    """A network of these models side by side, in eval mode and channels last, as training leaves it."""
    torch.manual_seed(seed)
    infos = [find(model) for model in models]
    built = build(models, sum(info.dense for info in infos if info), 10)
    _randomise_batch_norms(built.members)
    return built.eval().to(memory_format=torch.channels_last)


def data_of(model: str) -> DatasetInfo:
    """Facts about the dataset that a model is for."""
    info = find(model)
    assert info is not None
    return INFO[info.image]


def pixels_of(info: DatasetInfo) -> PixelScale:
    return PixelScale(info.mean, pixel_scale(info))


def images(n: int, info: DatasetInfo, seed: int = 1) -> Tensor:
    """Random pixels, uint8 [n, C, H, W]."""
    return torch.randint(256, (n, *info.shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def answers(module: nn.Module, given: Tensor, info: DatasetInfo) -> Tensor:
    """What torch computes from raw pixels."""
    with torch.no_grad():
        found: Tensor = module(normalise(given, info))
    return found


def group(seed: int) -> Network:
    """One to five members of one to three kinds, which differ in views and layers, with one linear head, in eval mode.

    They take images of 1x12x12, normalised.
    """
    torch.manual_seed(seed)
    draw = random.Random(seed)
    seeds = [draw.random() for _ in range(draw.choice([1, 1, 2, 3]))]
    members = [_member(random.Random(draw.choice(seeds))) for _ in range(draw.randint(1, 5))]
    _randomise_batch_norms(members)
    widths = [member.eval()(torch.zeros(2, 1, 12, 12)).shape[1] for member in members]
    return Network(members, nn.Linear(sum(widths), draw.choice([3, 10]))).eval()


def _member(draw: random.Random) -> nn.Module:
    """The same layers for the same state of `draw`, with weights of its own."""
    layers: list[nn.Module] = []
    channels, side = 1, 12
    for _ in range(draw.choice([0, 1, 2, 3])):
        filters, kernel, stride = draw.choice([2, 5, 16, 24]), draw.choice([1, 3]), draw.choice([1, 1, 2])
        padding = kernel // 2 if side < 5 else draw.choice([0, kernel // 2])
        layers.append(nn.Conv2d(channels, filters, kernel, stride, padding, bias=draw.random() < 0.5))
        if draw.random() < 0.5:
            layers.append(nn.BatchNorm2d(filters))
        channels, side = filters, (side + 2 * padding - kernel) // stride + 1
        layers.append(nn.ReLU(inplace=draw.random() < 0.5))
        if side >= 4 and draw.random() < 0.5:
            layers[-1] = ReLUMaxPool()
            side //= 2
    if draw.random() < 0.3:
        layers.append(GlobalMean())
        side = 1
    layers.append(nn.Flatten())
    width = channels * side**2
    for _ in range(draw.choice([0, 1, 2, 3])):
        layers += [nn.Linear(width, width := draw.choice([2, 7, 12])), nn.ReLU(), nn.Dropout()]
    if draw.random() < 0.5:
        layers.append(nn.Linear(width, draw.choice([2, 7, 32])))
    backbone = nn.Sequential(*layers)
    view = draw.choice([None, None, LowResolution(6), LowResolution(4), Centre(8)])
    return nn.Sequential(view, backbone) if view else backbone


def _randomise_batch_norms(modules: Iterable[nn.Module]) -> None:
    for module in (one for member in modules for one in member.modules()):
        if isinstance(module, nn.BatchNorm2d):
            for parameter, low in ((module.weight, 0.5), (module.bias, -0.5)):
                nn.init.uniform_(parameter, low, low + 1)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
