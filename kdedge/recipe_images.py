"""The images of a recipe: which there are, how they are cut, what a network sees of them, and those that are made."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from kdedge.data import catalog as datasets
from kdedge.losses.lesson import ClassName, FromList
from kdedge.losses.logits import Temperature
from kdedge.recipe_values import DatasetName, PositiveFloat, Seed
from kdedge.rules.data import CALIBRATION, VALIDATION


class Fields(BaseModel):
    """What all parts of a recipe have in common: an unknown key is an error, and nothing changes later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class Data(Fields):
    """The images, and how the training set is cut; the test set is never touched."""

    name: DatasetName = Field(examples=["fashion-mnist"])
    as_: datasets.As | None = Field(
        None,
        alias="as",
        description="rgb32: images of 28x28 padded to 32x32, on three channels, for networks of CIFAR-10",
    )
    split_seed: Seed = 0
    validation: int = Field(VALIDATION, ge=100, description="training images kept for selection and gates")
    calibration: int = Field(CALIBRATION, ge=1, description="training images kept for int8 calibration")
    limit: int | None = Field(None, ge=1, description="train on that many images only")

    @field_validator("as_")
    @classmethod
    def _fits(cls, as_: datasets.As | None, info: ValidationInfo) -> datasets.As | None:
        if "name" in info.data:
            datasets.find(info.data["name"], as_)
        return as_

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if key not in ("as", "as_") or value is not None}


class Augment(Fields):
    """Random changes of the training images."""

    flip: bool = Field(False, description="mirror left and right, every second time")
    shift: int = Field(0, ge=0, le=8, description="move by up to that many pixels in each direction")


class View(Fields):
    """What a network sees of the data: some of the training images, and of every image, also on the device, less.

    Validation and test have all of their images, whatever part of the training images a network sees.
    """

    fraction: float | None = Field(None, gt=0, le=1, description="that share of them, the first ones")
    per_class: int | None = Field(None, ge=1, description="the first so many of each class", examples=[100])
    classes: Annotated[tuple[ClassName, ...], FromList, Field(min_length=1)] | None = Field(
        None, description="only images of these classes, by name or number", examples=[["Shirt", "Coat"]]
    )
    resize: int | None = Field(
        None, ge=1, description="each image in so many pixels a side, means of blocks", examples=[14]
    )
    centre: int | None = Field(
        None, ge=1, description="so many pixels a side in the middle; the rest is grey", examples=[14]
    )

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        later = ("classes", "resize", "centre")  # than stages that are keyed by the other two
        return {key: value for key, value in fields.items() if key not in later or value is not None}

    @property
    def part(self) -> dict[str, Any]:
        """Which of the training images, as `Samples.part` takes it."""
        return {"fraction": self.fraction, "per_class": self.per_class, "classes": self.classes}

    @property
    def name(self) -> str:
        """A name for folders: equal for views of the same training images, and empty for all of them."""
        classes = None if self.classes is None else "+".join(quote(str(one), safe="") for one in self.classes)
        return "-".join(
            f"{key}{value}" for key, value in (self.part | {"classes": classes}).items() if value is not None
        )


# Of a much smaller concentration, gamma variables are all 0 in float64 (below 1e-323) now and then, which is no distribution.
_Beta = Annotated[float, Field(ge=0.05, le=1000)]


class Impressions(Fields):
    """Images made from a finished network alone, instead of the training images (Nayak et al. 2019). They have no labels."""

    source: str = Field(alias="from", examples=["teacher"], description="the network that they are made from")
    count: int = Field(40_000, ge=1, le=1_000_000, description="images")
    steps: int = Field(1500, ge=1, le=100_000, description="steps of Adam from noise to image")
    batch_size: int = Field(100, ge=1, le=65_536, description="images made at once")
    lr: PositiveFloat = Field(1e-3, description="of pixels that run from 0 to 1")
    noise: float = Field(1.0, ge=0, le=1, description="they start as random pixels from 0 to this")
    temperature: Temperature = 20.0
    betas: Annotated[tuple[_Beta, ...], FromList] = Field(
        (1.0, 0.1),
        min_length=1,
        max_length=16,
        description="scales of the classes' similarity; the smaller, the surer",
        examples=[[1.0, 0.1]],
    )
