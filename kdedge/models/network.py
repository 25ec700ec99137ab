"""The one shape that every network has here: members side by side -> dense vector -> head -> logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdedge.models import lenet, mlp, resnet, tcn, vgg
from kdedge.models.catalog import mlp_hidden, resnet_blocks

BACKBONES = {**tcn.BACKBONES, **mlp.BACKBONES, **lenet.BACKBONES, **vgg.BACKBONES, **resnet.BACKBONES}


class Network(nn.Module):
    """One backbone and its head, or a group of backbones that share one (the paper's "class" of students).

    A group's dense vector is the concatenation of its members' chunks (Malik et al. 2021, Eq. 4), and its head is
    linear on that vector (Eq. 5). A network that stands alone is a group of one.
    """

    head: nn.Linear

    def __init__(self, members: Sequence[nn.Module], head: nn.Linear, models: Sequence[str] = ()) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.head = head
        self.models = list(models)  # of each member, its name in the catalogue
        self._threads: ThreadPoolExecutor | None = None  # see side_by_side

    def dense(self, images: Tensor) -> Tensor:
        """Float [batch, C, H, W], normalised, to the dense vector, float [batch, width]."""
        if self._threads is not None:
            dense: Tensor = _SideBySide.apply(self.head.bias, images, self.members, self._threads)
            return dense
        chunks = [member(images) for member in self.members]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Float [batch, C, H, W], normalised, to logits, float [batch, classes]."""
        logits: Tensor = self.head(self.dense(images))
        return logits

    def train(self, mode: bool = True) -> Network:
        """As in every module, but members without anything to learn stay as they are: batch norm and dropout as well."""
        super().train(mode)
        for member in self.members:
            if not any(weight.requires_grad for weight in member.parameters()):
                member.eval()
        return self

    @contextmanager
    def side_by_side(self) -> Iterator[None]:
        """Within the block the members of a group train in threads of their own, forward and backward, on the CPU.

        A layer of a small network has too little work for two cores; two networks have enough. The gradients are those
        of one after another, to the last bits, which depend on the number of threads. Members with dropout would draw
        their random numbers in any order, so those run one after another still.
        """
        cores = torch.get_num_threads()
        workers = min(cores, len(self.members))
        random = any(isinstance(module, nn.Dropout | nn.Dropout2d) for module in self.members.modules())
        if workers < 2 or random or self.head.weight.device.type != "cpu":
            yield
            return
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(cores // workers,)) as threads:
            torch.set_num_threads(1)  # OpenMP's idle threads spin, on the cores that the members are on
            self._threads = threads
            try:
                yield
            finally:
                self._threads = None
                torch.set_num_threads(cores)


class _SideBySide(torch.autograd.Function):
    """The chunks of all members, each computed, and later differentiated, in a thread of `threads`.

    Autograd runs one graph on one thread of the CPU, so each member has a graph of its own and this is the seam. `seam`
    is any tensor that learns: without one among its inputs, autograd would not call `backward`. It gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, seam: Tensor, images: Tensor, members: nn.ModuleList, threads: ThreadPoolExecutor) -> Tensor:
        """Float [batch, C, H, W] to the dense vector, float [batch, width]."""
        ctx.threads = threads
        ctx.chunks = list(threads.map(lambda member: member(images), members))  # a new thread records gradients
        return torch.cat([chunk.detach() for chunk in ctx.chunks], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        """Adds to the gradients of the members' weights."""
        parts = torch.split(gradients[0], [chunk.shape[1] for chunk in ctx.chunks], 1)
        learning = [(chunk, part) for chunk, part in zip(ctx.chunks, parts, strict=True) if chunk.requires_grad]
        list(ctx.threads.map(lambda pair: torch.autograd.backward(*pair), learning))
        return None, None, None, None


def backbone(name: str) -> nn.Module:
    """A freshly initialised backbone of the catalogue. Raises KeyError for a name that the catalogue does not have."""
    if (hidden := mlp_hidden(name)) is not None:
        return mlp.mlp(hidden)
    if (blocks := resnet_blocks(name)) is not None:
        return resnet.resnet(*blocks)
    return BACKBONES[name]()  # type: ignore[no-untyped-call]


def build(models: Sequence[str], dense: int, classes: int) -> Network:
    """A freshly initialised network of the named backbones; `dense` is the width of all their outputs together."""
    return Network([backbone(name) for name in models], nn.Linear(dense, classes), models)


def count_parameters(module: nn.Module) -> int:
    """Number of trained values of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
