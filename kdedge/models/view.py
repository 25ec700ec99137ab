"""What a network sees of an image: parts without parameters that stand before its members, in training and on the device.

They keep the shape of the images, so that every model fits, and they are in the exported graph: it takes the whole image.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class LowResolution(nn.Module):
    """An image of `side` x `side` pixels, each the mean of a block, enlarged to the size that models take."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def extra_repr(self) -> str:
        """What the text of this module tells of it, as torch's own layers do."""
        return f"side={self.side}"

    def forward(self, images: Tensor) -> Tensor:
        """Float [batch, C, H, H] to the same shape; `side` divides H."""
        block = images.shape[-1] // self.side
        return F.interpolate(F.avg_pool2d(images, block), scale_factor=block, mode="nearest")


class Centre(nn.Module):
    """The `side` x `side` pixels in the middle. The rest is 0, which in a normalised image is the mean of all pixels."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def extra_repr(self) -> str:
        """What the text of this module tells of it, as torch's own layers do."""
        return f"side={self.side}"

    def forward(self, images: Tensor) -> Tensor:
        """Float [batch, C, H, H] to the same shape."""
        before = (images.shape[-1] - self.side) // 2
        after = images.shape[-1] - self.side - before
        inner = images[:, :, before : before + self.side, before : before + self.side]
        return F.pad(inner, (before, after, before, after))
