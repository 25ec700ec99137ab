"""The one shape that every network has here: members side by side -> dense vector -> head -> logits."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from kdedge.models import compact, lenet, mlp, resnet, tcn, vgg
from kdedge.models.catalog import mlp_hidden, resnet_blocks
from kdedge.models.layers import GlobalMean

BACKBONES = {
    **tcn.BACKBONES,
    **compact.BACKBONES,
    **mlp.BACKBONES,
    **lenet.BACKBONES,
    **vgg.BACKBONES,
    **resnet.BACKBONES,
}


class Network(nn.Module):
    """One backbone and its head, or a group of backbones that share one (the paper's "class" of students).

    A group's dense vector is the concatenation of its members' chunks (Malik et al. 2021, Eq. 4), and its head is
    linear on that vector (Eq. 5). A network that stands alone is a group of one. The members of an ensemble have a head
    each; it is deployed with one that gives the mean of their logits (`with_one_head`).
    """

    head: nn.Linear | Heads

    def __init__(self, members: Sequence[nn.Module], head: nn.Linear | Heads, models: Sequence[str] = ()) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.head = head
        self.models = list(models)  # of each member, its name in the catalogue
        self._threads: ThreadPoolExecutor | None = None  # see side_by_side

    def dense(self, images: Tensor) -> Tensor:
        """Float [batch, C, H, W], normalised, to the dense vector, float [batch, width]."""
        if self._threads is not None:
            seam = next(self.head.parameters())
            dense: Tensor = _SideBySide.apply(seam, images, self.members, self._threads)
            return dense
        chunks = [member(images) for member in self.members]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, 1)

    def outputs(self, images: Tensor, layers: Collection[str] = ()) -> dict[str, Tensor]:
        """`dense`, and of a network of one member what these of its layers give, float [batch, channels, H, W]."""
        if not layers:
            return {"dense": self.dense(images)}
        (member,) = self.members
        ends, found, x = layers_of(member), {}, images
        for number, module in enumerate(in_order(member)):
            x = module(x)
            found.update({name: x for name in layers if ends[name] == number})
        return {**found, "dense": x}

    def forward(self, images: Tensor) -> Tensor:
        """Float [batch, C, H, W], normalised, to logits, float [batch, classes]."""
        logits: Tensor = self.head(self.dense(images))
        return logits

    def heads(self) -> list[nn.Linear]:
        """The head, or that of each member of an ensemble."""
        return [self.head] if isinstance(self.head, nn.Linear) else self.head.of_members()

    def learners(self, dense: Tensor) -> list[tuple[Tensor, nn.Linear]]:
        """Each one that learns by itself, as its dense vector and its head: the network, or each member of an ensemble."""
        return _apart(dense, self.heads())

    def member(self, number: int) -> Network:
        """One member of an ensemble as a network that stands alone."""
        return Network([self.members[number]], self.heads()[number], [self.models[number]]).train(self.training)

    def with_one_head(self) -> Network:
        """The same members with one linear head, which gives the same logits but for rounding."""
        if isinstance(self.head, nn.Linear):
            return self
        return Network(list(self.members), mean_head(self.heads()), self.models).train(self.training)

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
        if workers < 2 or random or next(self.head.parameters()).device.type != "cpu":
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


class Heads(nn.Module):
    """A linear head for each member of an ensemble, on the member's own dense vector; together they give the mean."""

    def __init__(self, heads: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.members = nn.ModuleList(heads)
        self.in_features = sum(head.in_features for head in heads)
        self.out_features = heads[0].out_features

    def of_members(self) -> list[nn.Linear]:
        """The head of each member."""
        return [head for head in self.members if isinstance(head, nn.Linear)]

    def forward(self, dense: Tensor) -> Tensor:
        """The dense vectors of all members, float [batch, width of all], to logits, float [batch, classes]."""
        return torch.stack([head(own) for own, head in _apart(dense, self.of_members())]).mean(0)


def _apart(dense: Tensor, heads: Sequence[nn.Linear]) -> list[tuple[Tensor, nn.Linear]]:
    """Each head with the part of the dense vectors, float [batch, width of all], that is its own."""
    return list(zip(torch.split(dense, [head.in_features for head in heads], 1), heads, strict=True))


def mean_head(heads: Sequence[nn.Linear]) -> nn.Linear:
    """The linear head on the dense vectors of several networks side by side that gives the mean of their logits."""
    weight = torch.cat([head.weight.detach() for head in heads], 1) / len(heads)
    bias = torch.stack([head.bias.detach() for head in heads]).mean(0)
    return linear(weight, bias)


def merged(networks: Sequence[Network], how: Literal["mean", "sum"]) -> Network:
    """The members of all these networks as one, with a computed head.

    `mean` gives the mean of the networks' logits, `sum` what the first one's head makes of the sum of their dense vectors,
    which have one width: its weight on the sum is the same weight on each.
    """
    heads = [head for network in networks for head in network.with_one_head().heads()]
    first = heads[0]
    repeated = first.weight.detach().repeat(1, len(heads))
    head = mean_head(heads) if how == "mean" else linear(repeated, first.bias.detach())
    members = [member for network in networks for member in network.members]
    return Network(members, head, [model for network in networks for model in network.models])


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A linear layer with this weight, float [outputs, inputs], and bias, float [outputs]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return layer


class _SideBySide(torch.autograd.Function):
    """The chunks of all members, each computed, and later differentiated, in a thread of `threads`.

    Autograd runs one graph on one thread of the CPU, so each member has a graph of its own and this is the seam. `seam`
    is any tensor that learns: without one among its inputs, autograd would not call `backward`. It gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, seam: Tensor, images: Tensor, members: nn.ModuleList, threads: ThreadPoolExecutor) -> Tensor:
        """Float [batch, C, H, W] to the dense vector, float [batch, width]."""
        dtype, enabled = torch.get_autocast_dtype("cpu"), torch.is_autocast_enabled("cpu")

        def chunk(member: nn.Module) -> Tensor:  # a new thread records gradients, and knows nothing of autocast
            with torch.autocast("cpu", dtype, enabled):
                return cast(Tensor, member(images))

        ctx.threads = threads
        ctx.chunks = list(threads.map(chunk, members))
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


def layers_of(member: nn.Module) -> dict[str, int]:
    """The layers of a backbone by their names, and which of its modules each ends with, counted from 0.

    A layer is a convolution (conv1, conv2 and so on) or a residual block (block1 and so on) with all that follows it, batch
    norm, ReLU and pooling, up to the next one or to where the maps are averaged or flattened.
    """
    ends: dict[str, int] = {}
    name = None  # of the layer that the module belongs to; what a view leaves of the image belongs to none
    for number, module in enumerate(in_order(member)):
        if isinstance(module, nn.Flatten | GlobalMean):
            break
        if isinstance(module, nn.Conv2d | resnet.Residual):
            kind = "conv" if isinstance(module, nn.Conv2d) else "block"
            name = f"{kind}{1 + sum(other.startswith(kind) for other in ends)}"
        if name is not None:
            ends[name] = number
    return ends


def in_order(module: nn.Module) -> list[nn.Module]:
    """The modules that an image goes through, one after the other."""
    return [one for child in module for one in in_order(child)] if isinstance(module, nn.Sequential) else [module]


def build(models: Sequence[str], dense: int, classes: int) -> Network:
    """A freshly initialised network of the named backbones; `dense` is the width of all their outputs together."""
    return Network([backbone(name) for name in models], nn.Linear(dense, classes), models)


def build_ensemble(models: Sequence[str], widths: Sequence[int], classes: int) -> Network:
    """The same with a head for each backbone; `widths` are those of their outputs."""
    heads = [nn.Linear(width, classes) for width in widths]
    return Network([backbone(name) for name in models], Heads(heads), models)


def count_parameters(module: nn.Module) -> int:
    """Number of trained values of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
