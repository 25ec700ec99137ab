"""Views, order and normalisation of training images, each against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdedge.data.batches import Batch, Samples, Views, all_views, batches, normalise, pixel_scale, stable_seed
from kdedge.data.catalog import DATASETS
from kdedge.errors import DataError

CPU = torch.device("cpu")
FASHION, CIFAR = DATASETS["fashion-mnist"], DATASETS["cifar10"]


def drawn(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 256, shape, np.uint8)  # no black, so that filled pixels stand out


def moved(image: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
    """An image [C, H, W] moved by whole pixels, black where nothing came from."""
    image = np.roll(image, (down, right), (1, 2))
    image[:, : max(down, 0)] = 0
    image[:, image.shape[1] + min(down, 0) :] = 0
    image[:, :, : max(right, 0)] = 0
    image[:, :, image.shape[2] + min(right, 0) :] = 0
    return image


def every_view(image: NDArray[np.uint8], views: Views) -> list[NDArray[np.uint8]]:
    found = views.of(torch.from_numpy(image).expand(views.count, -1, -1, -1), torch.arange(views.count))
    assert found.dtype == torch.uint8
    return list(found.numpy())


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 5)])
def test_the_views_are_every_flip_at_every_place_once(flip: bool, shift: int, shape: tuple[int, int, int]) -> None:
    image, views = drawn(*shape), Views(flip, shift)
    steps = range(-shift, shift + 1)
    sides = [image, np.flip(image, 2)] if flip else [image]
    expected = [moved(side.copy(), down, right) for side in sides for down in steps for right in steps]
    found = every_view(image, views)
    assert views.count == len(expected) == len(found)
    assert sorted(view.tobytes() for view in found) == sorted(view.tobytes() for view in expected)


@pytest.mark.parametrize("views", [Views(), Views(flip=True), Views(shift=2), Views(flip=True, shift=2)])
def test_view_0_is_the_image_itself(views: Views) -> None:
    images = torch.from_numpy(drawn(5, 3, 9, 9))
    assert torch.equal(views.of(images, torch.zeros(5, dtype=torch.int64)), images)


def test_each_image_of_a_batch_has_its_own_view() -> None:
    images, views = drawn(6, 3, 9, 9), Views(flip=True, shift=1)
    numbers = [17, 0, 4, 4, 9, 1]
    found = views.of(torch.from_numpy(images), torch.tensor(numbers)).numpy()
    for image, number, view in zip(images, numbers, found, strict=True):
        assert np.array_equal(view, every_view(image, views)[number])


@pytest.mark.parametrize(("samples", "size"), [(100, 32), (64, 32), (5, 128), (1, 1)])
def test_an_epoch_has_each_sample_once(samples: int, size: int) -> None:
    found = batches(samples, Views(flip=True), size, seed=1, epoch=3, device=CPU)
    assert [len(batch.samples) for batch in found] == [min(size, samples - start) for start in range(0, samples, size)]
    assert sorted(torch.cat([batch.samples for batch in found]).tolist()) == list(range(samples))


def flat(found: list[Batch]) -> tuple[list[int], list[int]]:
    return torch.cat([batch.samples for batch in found]).tolist(), torch.cat([batch.views for batch in found]).tolist()


def test_batches_depend_on_seed_and_epoch_and_nothing_else() -> None:
    def made(seed: int, epoch: int) -> tuple[list[int], list[int]]:
        return flat(batches(300, Views(flip=True, shift=1), 16, seed=seed, epoch=epoch, device=CPU))

    first = made(1, 3)
    torch.manual_seed(99)  # nor on what was drawn before
    torch.rand(5)
    made(1, 2)
    assert made(1, 3) == first
    for other in (made(1, 4), made(2, 3)):
        assert other[0] != first[0] and other[1] != first[1]


def test_every_view_comes_about_equally_often() -> None:
    views = Views(flip=True, shift=1)
    _, numbers = flat(batches(18_000, views, 128, seed=0, epoch=0, device=CPU))
    counts = np.bincount(numbers, minlength=views.count)
    assert len(counts) == 18
    assert (abs(counts - 1000) < 5 * np.sqrt(1000)).all()


def test_all_views_are_each_sample_in_each_view_once() -> None:
    views = Views(flip=True, shift=1)
    samples, numbers = flat(list(all_views(10, views, 4, CPU)))
    assert sorted(zip(numbers, samples, strict=True)) == [(view, sample) for view in range(18) for sample in range(10)]


@pytest.mark.parametrize("info", [FASHION, CIFAR], ids=["one channel", "three channels"])
def test_normalise_is_numpys_float32_bit_for_bit(info: object) -> None:
    """And DequantizeLinear's: (pixel - zero point) * scale, the scale rounded to float32 first."""
    assert info is FASHION or info is CIFAR
    every_pixel = np.tile(np.arange(256, dtype=np.uint8), 3 * 3 * 8).reshape(-1, info.shape[0], 16, 16)
    scale = np.float32(1 / (255 * info.std))
    expected = (every_pixel.astype(np.float32) - np.float32(info.mean)) * scale
    found = normalise(torch.from_numpy(every_pixel), info)
    assert found.dtype == torch.float32
    assert found.numpy().tobytes() == expected.tobytes()
    assert pixel_scale(info) == scale


def test_normalised_images_are_channels_last_and_the_pixels_stay() -> None:
    images = torch.from_numpy(drawn(4, 3, 8, 8))
    before = images.clone()
    assert normalise(images, CIFAR).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


def test_samples_are_seen_in_their_views_and_normalised() -> None:
    images, labels, views = drawn(6, 1, 28, 28), np.arange(6), Views(flip=True)
    data = Samples.to(CPU, images, labels, FASHION, views)
    assert (len(data), data.images.dtype, data.labels.dtype) == (6, torch.uint8, torch.int64)
    found = data.seen(torch.tensor([4, 2]), torch.tensor([1, 0]))
    expected = np.stack([np.flip(images[4], 2), images[2]])
    assert torch.equal(found, normalise(torch.from_numpy(expected), FASHION))


def test_stable_seed_never_changes() -> None:
    """Python's own hash differs in every process; stage keys promise the same weights. From `sha256sum`."""
    assert stable_seed(0, "teacher", "weights") == 0x9432023E966C4706 >> 1


def test_stable_seeds_differ_and_fit_torch() -> None:
    seeds = {stable_seed(seed, name, step) for seed in range(3) for name in ("a", "b") for step in range(50)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_part_of_the_samples() -> None:
    labels = torch.tensor([3, 1, 3, 3, 1, 0, 3, 1])
    samples = Samples(torch.arange(8).view(8, 1, 1, 1).to(torch.uint8), labels, DATASETS["mnist"])

    def kept(fraction: float | None = None, per_class: int | None = None, *classes: str | int) -> list[int]:
        few = samples.part(fraction, per_class, classes or None)
        assert torch.equal(few.labels, labels[few.images.flatten().long()])
        return few.images.flatten().tolist()

    assert kept() == list(range(8))
    assert kept(per_class=2) == [0, 1, 2, 4, 5]
    assert kept(per_class=1) == [0, 1, 5]
    assert kept(fraction=0.5) == [0, 1, 2, 3]
    assert kept(fraction=0.5, per_class=1) == [0, 1]
    assert kept(fraction=0.01) == [0]
    assert kept(None, None, "1", 0) == [1, 4, 5, 7]
    assert kept(0.5, None, 3) == [0, 2]  # half of that class
    assert kept(None, 1, 3, 1) == [0, 1]
    with pytest.raises(DataError, match="None of the 8 images to train on is of these classes: 2, 9"):
        kept(None, None, 2, "9")
