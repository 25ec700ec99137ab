"""What `check` and `plan` need to know of every dataset, without numpy: shape, classes and normalisation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class DatasetInfo:
    """Facts about one dataset, and where it can be had.

    Networks see (pixel - mean) / (255 * std), with one integer mean and one std for all channels: then the uint8 pixels
    are a quantized tensor already, with zero point `mean`, and the deployed graph is exact.
    """

    shape: tuple[int, int, int]  # channels, height, width
    classes: tuple[str, ...]
    train_images: int  # as many as are published; the files at hand may hold fewer
    mean: int  # in pixel units, 0 to 255
    std: float  # as a fraction of 255
    format: Literal["idx", "cifar"]  # which reader
    torchvision: str  # class in torchvision.datasets
    torchvision_folder: str  # where that class leaves the files, under its root
    debian_package: str | None = None  # puts the files into /usr/share/datasets/<name>

    def class_number(self, given: str | int) -> int:
        """Number of the class that is given by its number or by its name. Raises ValueError for an unknown name."""
        return given if isinstance(given, int) else self.classes.index(given)


_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
_THINGS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

# mean and std are those of the training images, in fractions of 255: Fashion-MNIST 0.2860 and 0.3530, MNIST 0.1307 and
# 0.3081. CIFAR-10 is published by channel, means 0.4914 0.4822 0.4465 and stds 0.2470 0.2435 0.2616; all its values
# together have the mean of the means, 0.4734, and the variance mean(std^2) + var(means), that is a std of 0.2516.
DATASETS = {
    "fashion-mnist": DatasetInfo(
        (1, 28, 28), _CLOTHES, 60_000, 73, 0.3530, "idx", "FashionMNIST", "FashionMNIST/raw", "dataset-fashion-mnist"
    ),
    "mnist": DatasetInfo((1, 28, 28), tuple("0123456789"), 60_000, 33, 0.3081, "idx", "MNIST", "MNIST/raw"),
    "cifar10": DatasetInfo((3, 32, 32), _THINGS, 50_000, 121, 0.2516, "cifar", "CIFAR10", "cifar-10-batches-py"),
}

As = Literal["rgb32"]


def find(name: str, as_: As | None = None) -> DatasetInfo:
    """Facts about the dataset `name`; as "rgb32" its images are what networks for CIFAR-10 see.

    The pixels keep their normalisation. Raises KeyError for an unknown name, ValueError for images that are others than
    MNIST's already.
    """
    info = DATASETS[name]
    if as_ is None:
        return info
    if info.shape != (1, 28, 28):
        shape = " x ".join(map(str, info.shape))
        raise ValueError(f"rgb32 is for images of 1 x 28 x 28, {name} has {shape}; remove it")
    return replace(info, shape=(3, 32, 32))
