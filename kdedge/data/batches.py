"""Training images on the compute device as uint8, and batches of them: order, views and normalisation as tensor code.

A view is one way to look at an image: flipped or not, shifted by so many pixels. Views are numbered, so that a
network's outputs over all of them can be computed once (targets.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from kdedge.data.catalog import DatasetInfo
from kdedge.errors import DataError


@dataclass(frozen=True)
class Views:
    """The finite set of augmentations: horizontal flips, and shifts by up to `shift` pixels filled with black."""

    flip: bool = False
    shift: int = 0

    @property
    def name(self) -> str:
        """A name for folders: equal for equal sets of views."""
        return f"flip{int(self.flip)}-shift{self.shift}"

    @property
    def count(self) -> int:
        """How many different views an image has. View 0 is the image as it is."""
        return (1 + self.flip) * (2 * self.shift + 1) ** 2

    def of(self, images: Tensor, views: Tensor) -> Tensor:
        """Each image in its view: uint8 [batch, C, H, W] and int64 [batch] to uint8 [batch, C, H, W]."""
        if self.flip:
            flipped = (views % 2).bool().view(-1, 1, 1, 1)
            images = torch.where(flipped, images.flip(3), images)
        if self.shift:
            images = self._shifted(images, views // (1 + self.flip))
        return images

    def _shifted(self, images: Tensor, shifts: Tensor) -> Tensor:
        height, width, steps = images.shape[2], images.shape[3], 2 * self.shift + 1
        # Number 0 is "not shifted", so that view 0 is the image itself.
        shifts = (shifts + (steps * steps) // 2) % (steps * steps)
        rows = torch.arange(height, device=images.device) + (shifts // steps).unsqueeze(1)
        columns = torch.arange(width, device=images.device) + (shifts % steps).unsqueeze(1)
        padded = F.pad(images, (self.shift,) * 4)
        sample = torch.arange(len(images), device=images.device).view(-1, 1, 1)
        return padded[sample, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Samples:
    """Labelled images on the compute device: uint8 [N, C, H, W] and int64 [N], with their normalisation."""

    images: Tensor
    labels: Tensor
    info: DatasetInfo
    views: Views = Views()

    @classmethod
    def to(
        cls,
        device: torch.device,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        info: DatasetInfo,
        views: Views | None = None,
    ) -> Samples:
        """Copy arrays of the same kind to the device."""
        return cls(torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device), info, views or Views())

    def __len__(self) -> int:
        return len(self.images)

    def part(
        self, fraction: float | None = None, per_class: int | None = None, classes: Sequence[str | int] | None = None
    ) -> Samples:
        """Of the samples of `classes` the first `fraction`, at least one, and of those the first `per_class` of each class.

        Raises DataError when there is no sample of these classes.
        """
        keep = torch.arange(len(self), device=self.images.device)
        if classes is not None:
            numbers = torch.tensor([self.info.class_number(one) for one in classes], device=keep.device)
            keep = keep[torch.isin(self.labels, numbers)]
        if not len(keep):
            raise DataError(
                f"None of the {len(self):,} images to train on is of these classes: {', '.join(map(str, classes or ()))}"
            )
        keep = keep[: max(1, round((fraction or 1.0) * len(keep)))]
        if per_class is not None:
            one_hot = self.labels[keep].unsqueeze(1) == torch.arange(len(self.info.classes), device=keep.device)
            keep = keep[one_hot.cumsum(0)[one_hot] <= per_class]  # how many of its class there were, itself included
        return replace(self, images=self.images[keep], labels=self.labels[keep])

    def seen(self, samples: Tensor, views: Tensor) -> Tensor:
        """What a network sees of these samples in these views: float32 [batch, C, H, W], channels last."""
        return normalise(self.views.of(self.images[samples], views), self.info)


def normalise(images: Tensor, info: DatasetInfo) -> Tensor:
    """Uint8 [batch, C, H, W] to (pixel - mean) / (255 std), float32, channels last.

    The scale is rounded to float32 first, as ONNX's DequantizeLinear has it: the deployed graph sees the same bits.
    """
    pixels = images.to(torch.float32, memory_format=torch.channels_last, copy=True)
    return pixels.sub_(info.mean).mul_(pixel_scale(info))


def pixel_scale(info: DatasetInfo) -> float:
    """1 / (255 std), rounded to float32."""
    return float(np.float32(1 / (255 * info.std)))


def batches(samples: int, views: Views, size: int, *, seed: int, epoch: int, device: torch.device) -> list[Batch]:
    """All batches of one epoch, the last one perhaps smaller: a pure function of seed and epoch.

    Each sample comes once, in a view drawn anew in each epoch. Drawn on the CPU, so that every device sees the same.
    """
    generator = torch.Generator().manual_seed(stable_seed(seed, "epoch", epoch))
    order = torch.randperm(samples, generator=generator)
    drawn = torch.randint(views.count, (samples,), generator=generator)
    chunks = zip(torch.split(order.to(device), size), torch.split(drawn.to(device), size), strict=True)
    return [Batch(order, views) for order, views in chunks]


@dataclass(frozen=True)
class Batch:
    """Sample numbers and the view of each, int64 [batch]."""

    samples: Tensor
    views: Tensor


def all_views(samples: int, views: Views, size: int, device: torch.device) -> Iterator[Batch]:
    """Every sample in view 0, then in view 1 and so on."""
    for view in range(views.count):
        for part in torch.split(torch.arange(samples, device=device), size):
            yield Batch(part, torch.full_like(part, view))


def stable_seed(*parts: int | str) -> int:
    """A seed below 2^63 from any parts, the same in every process."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
