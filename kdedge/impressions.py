"""Data impressions: images made from a finished network alone, for students that see no training image (Nayak et al. 2019).

Output vectors are drawn from Dirichlet distributions whose concentrations say how alike the classes are to the network's last
layer; then noise is changed by gradient descent until the network, softened by a temperature, answers with these vectors.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdedge.data.batches import normalise, stable_seed
from kdedge.data.catalog import DatasetInfo
from kdedge.errors import RunError
from kdedge.models.network import Network
from kdedge.recipe_images import Impressions
from kdedge.store import read_document, sha256, write_bytes

Watch = Callable[[int, int, float, float], None]  # images done, images in all, divergence of the last batch, images/s


def class_similarity(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """How alike classes are: the cosine of their weights in the last layer, float64 [classes, classes] from [classes, width].

    Concentrations must not be negative, so each row is stretched to run from 0 to 1.
    """
    rows = weights / np.linalg.norm(weights, axis=1, keepdims=True)
    cosine = rows @ rows.T
    low, high = cosine.min(1, keepdims=True), cosine.max(1, keepdims=True)
    stretched: NDArray[np.float64] = (cosine - low) / (high - low)
    return stretched


def wanted_outputs(similarity: NDArray[np.float64], settings: Impressions, seed: int) -> NDArray[np.float32]:
    """The vectors to be answered with, float32 [count, classes], each of sum 1: of every class, with every beta, as many.

    Image n is of class n modulo the classes, Dirichlet(beta * similarity[class]).
    """
    classes, number = len(similarity), np.arange(settings.count)
    betas = np.array(settings.betas)[number // classes % len(settings.betas)]
    # A Dirichlet variable is independent gamma variables, scaled to sum 1; a concentration of 0 gives 0.
    drawn = np.random.default_rng(seed).standard_gamma(betas[:, None] * similarity[number % classes])
    outputs: NDArray[np.float32] = (drawn / drawn.sum(1, keepdims=True)).astype(np.float32)
    return outputs


def divergence(network: Network, pixels: Tensor, wanted: Tensor, info: DatasetInfo, temperature: float) -> Tensor:
    """KL(wanted || softmax(logits / T)) of each image, float32 [n], from pixels of any type, 0 to 255, [n, C, H, W].

    It is the paper's cross-entropy but for the entropy of `wanted`, which no image can change, and 0 where the network answers
    just as wanted.
    """
    log_p = (network(normalise(pixels, info)) / temperature).log_softmax(1)
    each: Tensor = (torch.xlogy(wanted, wanted) - wanted * log_p).sum(1)
    return each


@dataclass(frozen=True)
class Synthesis:
    """What was made, how near the network's answers are to what was wanted (mean divergence, of the noise and of the images),
    and how long it took."""

    images: NDArray[np.uint8]  # [count, C, H, W]
    divergence_noise: float
    divergence: float
    seconds: float


def synthesize(
    network: Network,
    info: DatasetInfo,
    settings: Impressions,
    *,
    seed: int,
    checkpoint: Path,
    checkpoint_every_s: float,
    watch: Watch,
    stop: Callable[[], bool],
) -> Synthesis:
    """Images of the shape and pixel range that `network` sees, from what it knows alone.

    A batch is a pure function of seed and number, so a killed synthesis goes on from the finished batches in `checkpoint` and
    ends in the same bytes. When `stop` says so, it saves them and raises KeyboardInterrupt.
    """
    network = network.with_one_head().eval()
    network.requires_grad_(False)
    (head,) = network.heads()
    device = head.weight.device
    similarity = class_similarity(head.weight.double().cpu().numpy())
    wanted = torch.from_numpy(wanted_outputs(similarity, settings, stable_seed(seed, "outputs"))).to(device)
    made, spent_s = _resume(checkpoint)
    first, began, saved_at = sum(map(len, made)), time.monotonic(), time.monotonic()
    batches = list(enumerate(torch.split(wanted, settings.batch_size)))
    for number, targets in batches[len(made) :]:
        batch = _noise(seed, number, targets, info, settings.noise).requires_grad_()
        optimizer = torch.optim.Adam([batch], settings.lr)
        for _ in range(settings.steps):
            if stop():
                _save(checkpoint, made, spent_s + time.monotonic() - began)
                raise KeyboardInterrupt
            loss = divergence(network, 255 * batch, targets, info, settings.temperature)
            optimizer.zero_grad()
            loss.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            batch.data.clamp_(0, 1)
        made.append((255 * batch.detach()).round().to(torch.uint8).cpu().numpy())
        done = sum(map(len, made))
        watch(done, len(wanted), loss.mean().item(), (done - first) / (time.monotonic() - began))
        if time.monotonic() - saved_at > checkpoint_every_s:
            _save(checkpoint, made, spent_s + time.monotonic() - began)
            saved_at = time.monotonic()

    def mean_divergence(pixels: Callable[[int, Tensor], Tensor]) -> float:
        with torch.no_grad():
            found = [divergence(network, pixels(n, y), y, info, settings.temperature) for n, y in batches]
        return torch.cat(found).mean().item()

    return Synthesis(
        np.concatenate(made),
        divergence_noise=mean_divergence(
            lambda number, targets: 255 * _noise(seed, number, targets, info, settings.noise)
        ),
        divergence=mean_divergence(lambda number, targets: torch.from_numpy(made[number]).to(device)),
        seconds=spent_s + time.monotonic() - began,
    )


def _noise(seed: int, number: int, targets: Tensor, info: DatasetInfo, brightest: float) -> Tensor:
    """What a batch starts as, float32 on the scale from 0 to 1 that `lr` is for. Drawn on the CPU, so that devices agree."""
    generator = torch.Generator().manual_seed(stable_seed(seed, "noise", number))
    return (torch.rand(len(targets), *info.shape, generator=generator) * brightest).to(targets.device)


def _save(checkpoint: Path, made: list[NDArray[np.uint8]], spent_s: float) -> None:
    content = io.BytesIO()
    np.savez(content, *made, spent_s=spent_s)
    write_bytes(checkpoint, content.getvalue())


def _resume(checkpoint: Path) -> tuple[list[NDArray[np.uint8]], float]:
    """The batches of the checkpoint, if there is one, and the seconds that they took."""
    if not checkpoint.is_file():
        return [], 0.0
    arrays = _arrays(checkpoint)
    spent_s = float(arrays.pop("spent_s", 0.0))
    return list(arrays.values()), spent_s


def write_impressions(folder: Path, images: NDArray[np.uint8]) -> dict[str, str]:
    """Write images.npz, and images.png with the first hundred of them to look at; returns the hash that tells a change."""
    from torchvision.utils import save_image

    content, picture = io.BytesIO(), io.BytesIO()
    np.savez_compressed(content, images=images)
    write_bytes(folder / "images.npz", content.getvalue())
    # Ten in a row: of ten classes, a column each.
    save_image(torch.from_numpy(images[:100]) / 255, picture, "png", nrow=10, pad_value=0.5)
    write_bytes(folder / "images.png", picture.getvalue())
    return {"images_sha256": sha256(folder / "images.npz")}


def read_impressions(folder: Path) -> NDArray[np.uint8]:
    """The images of a finished synthesis, uint8 [count, C, H, W]. Raises RunError when they are not those that were committed."""
    file = folder / "images.npz"
    expected = read_document(folder / "stage.json").get("images_sha256", "(none)")
    if not file.is_file() or sha256(file) != expected:
        raise RunError(f"{file} is missing or was changed. Delete its folder and distil again.")
    images: NDArray[np.uint8] = _arrays(file)["images"]
    return images


def _arrays(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as content:
            return dict(content)
    except (OSError, ValueError, BadZipFile) as error:
        raise RunError(f"{file} is damaged: {error}. Delete it and distil again.") from None
