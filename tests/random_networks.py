"""Networks of the catalogue with random weights and random statistics of their batch norms, and images for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exporters.float32 import PixelScale
from kdedge.data.batches import normalise, pixel_scale
from kdedge.data.catalog import DATASETS, DatasetInfo
from kdedge.models.catalog import find
from kdedge.models.network import Network, build

INFO = {(1, 28, 28): DATASETS["fashion-mnist"], (3, 32, 32): DATASETS["cifar10"]}


def network(*models: str, seed: int = 0) -> Network:
    """A network of these models side by side, in eval mode and channels last, as training leaves it."""
    torch.manual_seed(seed)
    infos = [find(model) for model in models]
    built = build(models, sum(info.dense for info in infos if info), 10)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            for parameter, low in ((module.weight, 0.5), (module.bias, -0.5)):
                nn.init.uniform_(parameter, low, low + 1)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
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
