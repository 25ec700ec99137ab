"""The one shape that every network has here: members side by side -> dense vector -> head -> logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdedge.models import lenet, mlp, tcn, vgg
from kdedge.models.catalog import mlp_hidden

BACKBONES = {**tcn.BACKBONES, **mlp.BACKBONES, **lenet.BACKBONES, **vgg.BACKBONES}


class Network(nn.Module):
    """One backbone and its head, or a group of backbones that share one (the paper's "class" of students).

    A group's dense vector is the concatenation of its members' chunks (Malik et al. 2021, Eq. 4), and its head is
    linear on that vector (Eq. 5). A network that stands alone is a group of one.
    """

    head: nn.Linear

    def __init__(self, members: Sequence[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.head = head

    def dense(self, images: Tensor) -> Tensor:
        """Float [batch, C, H, W], normalised, to the dense vector, float [batch, width]."""
        chunks = [member(images) for member in self.members]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Float [batch, C, H, W], normalised, to logits, float [batch, classes]."""
        logits: Tensor = self.head(self.dense(images))
        return logits


def backbone(name: str) -> nn.Module:
    """A freshly initialised backbone of the catalogue. Raises KeyError for a name that the catalogue does not have."""
    hidden = mlp_hidden(name)
    return mlp.mlp(hidden) if hidden is not None else BACKBONES[name]()  # type: ignore[no-untyped-call]


def build(models: Sequence[str], dense: int, classes: int) -> Network:
    """A freshly initialised network of the named backbones; `dense` is the width of all their outputs together."""
    return Network([backbone(name) for name in models], nn.Linear(dense, classes))


def count_parameters(module: nn.Module) -> int:
    """Number of trained values of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
