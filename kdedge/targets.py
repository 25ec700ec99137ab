"""What students learn from: the outputs of a finished network over the training views.

When the views are few they are computed once, kept on disk and read back by every student and every later run. When
they are many the live network runs once a batch, for all siblings together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kdedge.data.batches import Batch, Samples, all_views
from kdedge.models.network import Network
from kdedge.store import load_tensors, new_folder, read_document, save_tensors, sha256, write_json

CACHE_LIMIT_BYTES = 1 << 30  # more than that is slower to read back than it is to compute
BATCH = 512

Progress = Callable[[int, int], None]  # images done, images in all


@dataclass(frozen=True)
class Cached:
    """Outputs computed before, by name: `dense` and `logits`, or one of them, float32 [views, N, width]."""

    outputs: Mapping[str, Tensor]
    needs_images = False

    def __call__(self, batch: Batch, images: Tensor | None) -> dict[str, Tensor]:
        """Those outputs of a batch; the images are not looked at."""
        return {name: output[batch.views, batch.samples] for name, output in self.outputs.items()}


@dataclass(frozen=True)
class Live:
    """Outputs computed when they are asked for, in eval mode and without gradients."""

    network: Network
    layers: Collection[str] = ()  # of which it gives the maps too
    needs_images = True

    def __call__(self, batch: Batch, images: Tensor | None) -> dict[str, Tensor]:
        """`dense`, `logits` and the maps of `layers` of a batch of normalised images, float32 [batch, C, H, W]."""
        assert images is not None
        with torch.no_grad():
            outputs = self.network.outputs(images, self.layers)
            return {**outputs, "logits": self.network.head(outputs["dense"])}


@dataclass
class Training:
    """Outputs of a network that trains in the same steps: what it gave this batch, before it learned from it."""

    layers: Collection[str] = ()  # of which it gives the maps too
    given: dict[str, Tensor] = field(default_factory=dict)
    needs_images = False

    def show(self, outputs: Mapping[str, Sequence[Tensor]]) -> None:
        """Take what a network, or each member of an ensemble, gave; an ensemble's logits are their mean. No gradient flows
        back to it."""
        self.given = {name: given[0].detach() for name, given in outputs.items() if name in self.layers}
        self.given["dense"] = torch.cat([own.detach() for own in outputs["dense"]], 1)
        self.given["logits"] = torch.stack([own.detach() for own in outputs["logits"]]).mean(0)

    def __call__(self, batch: Batch, images: Tensor | None) -> dict[str, Tensor]:
        """Those outputs; batch and images are those that it was shown."""
        return self.given


@dataclass(frozen=True)
class Rest:
    """What a network leaves over of another one's dense vector: theirs less its own."""

    whole: Cached | Live | Training
    known: Cached | Live | Training

    @property
    def needs_images(self) -> bool:
        """Whether one of them is live."""
        return self.whole.needs_images or self.known.needs_images

    def __call__(self, batch: Batch, images: Tensor | None) -> dict[str, Tensor]:
        """`dense` of a batch of normalised images, float32 [batch, C, H, W]."""
        return {"dense": self.whole(batch, images)["dense"] - self.known(batch, images)["dense"]}


Targets = Cached | Live | Training | Rest


def targets(
    network: Network,
    data: Samples,
    folder: Path,
    *,
    wanted: Collection[str],
    epochs: int,
    progress: Progress,
) -> Cached | Live:
    """The outputs of a finished network for training over `epochs`: from `folder`, computed into `folder`, or live.

    `wanted` are `dense`, `logits` and names of layers. They are cached when every view is seen about once or more, and
    all of them fit in CACHE_LIMIT_BYTES. Maps of layers are a hundred times as large as a dense vector, so they are never
    kept.
    """
    network.eval()
    widths = _widths(network)
    width = sum(widths.get(name, 0) for name in wanted)
    if layers := [name for name in wanted if name not in widths]:
        return Live(network, layers)
    if data.views.count > epochs or data.views.count * len(data) * width * 4 > CACHE_LIMIT_BYTES:
        return Live(network)
    if not folder.is_dir():
        made = compute(network, data, wanted, progress)
        with new_folder(folder) as temporary:
            save_tensors(temporary / "outputs.safetensors", made.outputs)
            write_json(temporary / "outputs.json", {"outputs_sha256": sha256(temporary / "outputs.safetensors")})
        return made
    digest = read_document(folder / "outputs.json").get("outputs_sha256", "(none)")
    tensors = load_tensors(folder / "outputs.safetensors", digest)
    return Cached({name: tensors[name].to(data.images.device) for name in wanted})


def compute(network: Network, data: Samples, wanted: Collection[str], progress: Progress) -> Cached:
    """The `wanted` outputs of `network`, `dense` and `logits` or one of them, for every sample in every view."""
    views, samples, device, widths = data.views.count, len(data), data.images.device, _widths(network)
    outputs = {name: torch.empty(views, samples, widths[name], device=device) for name in wanted}
    live, done = Live(network), 0
    for batch in all_views(samples, data.views, BATCH, device):
        given = live(batch, data.seen(batch.samples, batch.views))
        for name, output in outputs.items():
            output[batch.views, batch.samples] = given[name]
        done += len(batch.samples)
        progress(done, views * samples)
    return Cached(outputs)


def _widths(network: Network) -> dict[str, int]:
    return {"dense": network.head.in_features, "logits": network.head.out_features}
