"""Lessons on the maps that a layer inside the student gives: what a layer inside the source makes of the same image.

Maps are float [batch, channels, height, width]. Both networks stand alone, and both layers have maps of one height and width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kdedge.losses.lesson import Lesson, Part, Shape

if TYPE_CHECKING:
    from torch import Tensor


class Features(Lesson):
    """The fields of every lesson on maps."""

    what: Literal["features"] = "features"
    layer: str = Field(description="the student's layer", examples=["conv2"])
    from_layer: str = Field(description="the layer of the network that is learned from", examples=["conv2"])

    @property
    def output(self) -> str:
        """The student's layer."""
        return self.layer

    @property
    def target(self) -> str:
        """The layer of the network that is learned from."""
        return self.from_layer


class FitNet(Features):
    """Hints: a regressor, here a 1x1 convolution, that learns along, turns the student's maps into the teacher's.

    Romero et al. 2015, Eq. 3, as a mean over all values. The paper takes the hint first and the labels afterwards; here all
    lessons are learned at once, as in the benchmark of Tian et al. 2020.
    """

    has_parts = True
    loss: Literal["fitnet"] = "fitnet"

    def parts(self, members: int, student: Shape, target: Shape) -> dict[str, Part]:
        """The regressor."""
        return {"weight": Part((target[0], student[0]), student[0]), "bias": Part((target[0], 1))}

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor, *, weight: Tensor, bias: Tensor) -> Tensor:
        """Scalar from the maps of student and target; `labels` are not looked at."""
        return (weight @ student.flatten(2) + bias - target.flatten(2)).square().mean()


class Attention(Features):
    """Attention transfer: where the squares of the maps, summed over the channels, are large, whatever the channels are.

    Zagoruyko and Komodakis 2017, Eq. 2 with p = 2, each sample's map scaled to length 1. The squared difference is averaged
    over all places as in the authors' code, so its values are small: weights of some hundred to a thousand are usual.
    """

    loss: Literal["attention"] = "attention"

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from the maps of student and target; `labels` are not looked at."""
        return (_attention(student) - _attention(target)).square().mean()


class VID(Features):
    """Variational information distillation: the teacher's maps are drawn around what the student's maps predict of them.

    Ahn et al. 2019, in the form of the authors' code: the Gaussian's mean is three 1x1 convolutions of the student's maps,
    and its variance is one number a channel, softplus of what is learned, 5 in the beginning. The loss is the negative
    logarithm of the density, without its constant, as a mean over all values.
    """

    has_parts = True
    loss: Literal["vid"] = "vid"

    def parts(self, members: int, student: Shape, target: Shape) -> dict[str, Part]:
        """The three convolutions, without bias, and by how much what is learned of the variance exceeds that of 5."""
        channels = target[0]
        layers = {"weight0": Part((channels, student[0]), student[0])}
        layers |= {f"weight{n}": Part((channels, channels), channels) for n in (1, 2)}
        return {**layers, "variance": Part((channels, 1))}

    def __call__(
        self,
        student: Tensor,
        target: Tensor,
        labels: Tensor,
        *,
        weight0: Tensor,
        weight1: Tensor,
        weight2: Tensor,
        variance: Tensor,
    ) -> Tensor:
        """Scalar from the maps of student and target; `labels` are not looked at."""
        hidden = (weight1 @ (weight0 @ student.flatten(2)).relu()).relu()
        variance = (variance + math.log(math.expm1(5 - 1e-5))).logaddexp(variance.new_zeros(())) + 1e-5
        return 0.5 * ((target.flatten(2) - weight2 @ hidden).square() / variance + variance.log()).mean()


def _attention(maps: Tensor) -> Tensor:
    """Float [batch, height * width]: each sample's attention, of length 1."""
    attention = maps.square().mean(1).flatten(1)
    scaled: Tensor = attention / attention.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return scaled
