"""What several tests share: a few hundred Fashion-MNIST images in their own format, and a recipe as small as they are."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from kdedge.recipe import Recipe
from kdedge.recipe_reader import parse_recipe

REAL = Path("/usr/share/datasets/fashion-mnist")  # Debian's dataset-fashion-mnist
TRAIN, TEST = 700, 200

# Two networks, three stages, 34 steps an epoch: a second of training, with a convolution and cached outputs of two views.
TINY = """
name: tiny
data: {name: fashion-mnist, validation: 100, calibration: 60}
networks:
  teacher:
    model: tcn-student-4
    fit: {epochs: 2, batch_size: 16, augment: {flip: true}}
  students:
    model: mlp-32
    count: 2
    learns: [{from: teacher, what: dense, loss: mse}]
    fit: {epochs: 2, batch_size: 16, augment: {flip: true}}
    head: {from: teacher, fine_tune_epochs: 2}
"""


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `data_dir`: fashion-mnist/ with 700 training and 200 test images, real ones where there are some."""
    folder = tmp_path_factory.mktemp("data")
    target = folder / "fashion-mnist"
    target.mkdir()
    for split, count in (("train", TRAIN), ("t10k", TEST)):
        images, labels = _real(split, count) if REAL.is_dir() else _drawn(count)
        header = struct.pack(">4I", 0x803, count, 28, 28)
        (target / f"{split}-images-idx3-ubyte").write_bytes(header + images)
        (target / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, count) + labels)
    return folder


@pytest.fixture
def tiny() -> Recipe:
    """The recipe TINY."""
    return parse_recipe(TINY)


def _real(split: str, count: int) -> tuple[bytes, bytes]:
    with (
        gzip.open(REAL / f"{split}-images-idx3-ubyte.gz") as images,
        gzip.open(REAL / f"{split}-labels-idx1-ubyte.gz") as labels,
    ):
        images.read(16), labels.read(8)
        return images.read(count * 784), labels.read(count)


def _drawn(count: int) -> tuple[bytes, bytes]:
    """Ten fixed patterns under noise: an image's class can be learned."""
    patterns = np.random.default_rng(0).integers(0, 128, (10, 784))
    random = np.random.default_rng(count)
    labels = np.arange(count) % 10
    images = patterns[labels] + random.integers(0, 128, (count, 784))
    return images.astype(np.uint8).tobytes(), labels.astype(np.uint8).tobytes()
