"""What students learn from: the outputs of a finished network over the training views.

When the views are few they are computed once, kept on disk and read back by every student and every later run. When
they are many the live network runs once a batch, for all siblings together.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
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
    """Outputs computed before: dense, float32 [views, N, width], and logits, float32 [views, N, classes]."""

    dense: Tensor
    logits: Tensor
    needs_images = False

    def __call__(self, batch: Batch, images: Tensor | None) -> dict[str, Tensor]:
        """`dense` and `logits` of a batch; the images are not looked at."""
        where = (batch.views, batch.samples)
        return {"dense": self.dense[where], "logits": self.logits[where]}


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


@dataclass(frozen=True)
class Rest:
    """What a network leaves over of another one's outputs: theirs less its own."""

    whole: Cached | Live
    known: Cached | Live

    @property
    def needs_images(self) -> bool:
        """Whether one of them is live."""
        return self.whole.needs_images or self.known.needs_images

    def __call__(self, batch: Batch, images: Tensor | None) -> dict[str, Tensor]:
        """`dense` and `logits` of a batch of normalised images, float32 [batch, C, H, W]."""
        whole, known = self.whole(batch, images), self.known(batch, images)
        return {what: whole[what] - known[what] for what in ("dense", "logits")}


Targets = Cached | Live | Rest


def targets(
    network: Network,
    data: Samples,
    folder: Path,
    *,
    epochs: int,
    progress: Progress,
    layers: Collection[str] = (),
) -> Cached | Live:
    """The outputs of a finished network for training over `epochs`: from `folder`, computed into `folder`, or live.

    They are cached when every view is seen about once or more, and all of them fit in CACHE_LIMIT_BYTES. Maps of `layers`
    are a hundred times as large as a dense vector, so they are never kept.
    """
    network.eval()
    width = network.head.in_features + network.head.out_features
    if layers or data.views.count > epochs or data.views.count * len(data) * width * 4 > CACHE_LIMIT_BYTES:
        return Live(network, layers)
    device = data.images.device
    if not folder.is_dir():
        outputs = compute(network, data, progress)
        with new_folder(folder) as temporary:
            save_tensors(temporary / "outputs.safetensors", {"dense": outputs.dense, "logits": outputs.logits})
            write_json(temporary / "outputs.json", {"outputs_sha256": sha256(temporary / "outputs.safetensors")})
        return outputs
    digest = read_document(folder / "outputs.json").get("outputs_sha256", "(none)")
    tensors = load_tensors(folder / "outputs.safetensors", digest)
    return Cached(tensors["dense"].to(device), tensors["logits"].to(device))


def compute(network: Network, data: Samples, progress: Progress) -> Cached:
    """The outputs of `network` for every sample in every view."""
    views, samples, head = data.views.count, len(data), network.head
    dense = torch.empty(views, samples, head.in_features, device=data.images.device)
    logits = torch.empty(views, samples, head.out_features, device=data.images.device)
    live, done = Live(network), 0
    for batch in all_views(samples, data.views, BATCH, data.images.device):
        outputs = live(batch, data.seen(batch.samples, batch.views))
        where = (batch.views, batch.samples)
        dense[where], logits[where] = outputs["dense"], outputs["logits"]
        done += len(batch.samples)
        progress(done, views * samples)
    return Cached(dense, logits)
