"""The recipe as frozen classes: networks and the lessons each learns. A recipe is data and runs nothing.

The losses' own keys are in losses/, those of images in recipe_images.py, the rules between the parts in rules/;
recipe_reader.py makes recipes from YAML and says what is wrong with them.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from kdedge.losses import LOSSES, OF_MEMBERS, Lesson
from kdedge.losses.dense import MSE
from kdedge.losses.lesson import FromList
from kdedge.losses.logits import KD, CrossEntropy
from kdedge.models import catalog
from kdedge.recipe_images import Augment, Data, Fields, Impressions, View
from kdedge.recipe_values import (
    Calibration,
    CpuClass,
    ModelName,
    NetworkName,
    NotNegativeFloat,
    OneOrMoreModels,
    PositiveFloat,
    RunName,
    Seed,
    Slug,
)
from kdedge.rules import together
from kdedge.rules.merge import split_name
from kdedge.rules.recipe import MAX_MEMBERS

if TYPE_CHECKING:
    _AnyLesson = Lesson
else:  # for pydantic: the class that `loss` names
    _AnyLesson = Annotated[reduce(or_, LOSSES.values()), Field(discriminator="loss")]


class Fit(Fields):
    """How a network is trained."""

    epochs: int = Field(together.EPOCHS, ge=1, le=100_000)
    batch_size: int = Field(together.BATCH_SIZE, ge=1, le=65_536)
    optimizer: Literal["adam", "sgd"] = together.OPTIMIZER
    lr: PositiveFloat = 1e-3
    momentum: float = Field(0.9, ge=0, le=1, description="of sgd only")
    weight_decay: NotNegativeFloat = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.0, ge=0, le=0.9, description="fraction of the steps over which lr rises from 0")
    augment: Augment = Augment()
    partner: str | None = Field(
        None,
        alias="with",
        description="the network that takes the same steps; lessons from it are what it knows by then",
        examples=["teacher"],
    )

    @field_validator("momentum")
    @classmethod
    def _sgd_only(cls, momentum: float, info: ValidationInfo) -> float:
        if info.data.get("optimizer") == "adam":  # not called when momentum is not written
            raise ValueError("adam has no momentum; remove it, or write optimizer: sgd")
        return momentum

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        unused = {"momentum"} if self.optimizer != "sgd" else set()
        unused |= {"partner", "with"} if self.partner is None else set()
        return {key: value for key, value in fields.items() if key not in unused}


class Head(Fields):
    """A head that starts as another network's and is then trained alone on the labels."""

    source: str = Field(alias="from", examples=["teacher"], description="the network whose head it starts as")
    fine_tune_epochs: int = Field(0, ge=0, le=100_000)
    fine_tune_lr: PositiveFloat = 1e-3


class Improve(Fields):
    """The members that learned worst make way for fresh ones of a better model (Malik et al. 2021, section 4.2)."""

    worst: int = Field(ge=1, le=MAX_MEMBERS, examples=[1], description="so many, by loss on the validation images")
    model: ModelName = Field(alias="with", examples=["tcn-student-4x"], description="the model that replaces them")


class Quantize(Fields):
    """Training with rounded weights and activations, as the int8 file will have them."""

    weights: Literal[8, 4, 2] = Field(8, description="bits, but for the first layer and the head, which have 8")
    activations: Literal[8] = Field(8, description="bits")
    observe_steps: int = Field(
        1000, ge=1, le=10_000_000, description="steps of training that set the ranges of activations; then they stay"
    )
    source: str | None = Field(
        None, alias="from", description="the finished network whose weights it starts with", examples=["student"]
    )


class Network(Fields):
    """A model, or a group of models: they share the dense vector they learn in equal chunks, or each learns the whole."""

    model: OneOrMoreModels | None = Field(None, examples=["tcn-student-4"])
    count: int | None = Field(None, ge=1, le=MAX_MEMBERS, description="members of the group; without it, no group")
    split: Literal["chunks", "none"] = Field(
        "chunks",
        description="of a group; `none`: an ensemble, whose members learn the whole and whose logits are their mean",
    )
    learns: Annotated[tuple[_AnyLesson, ...], FromList] = Field(
        (CrossEntropy(),), min_length=1, max_length=64, examples=[[{"from": "teacher", "loss": "mse"}]]
    )
    fit: Fit = Fit()
    view: View | None = None
    improve: Improve | None = None
    head: Head | None = None
    impressions: Impressions | None = None
    quantize: Quantize | None = None
    members: Annotated[tuple[str, ...], FromList, Field(min_length=1, max_length=MAX_MEMBERS)] | None = Field(
        None, examples=[["first", "second"]], description="instead of a model: the finished networks that it is made of"
    )
    merge: Literal["mean", "sum"] | None = Field(
        None, description="of members; mean of their logits, or sum of their dense vectors through the first one's head"
    )

    @field_validator("count")
    @classmethod
    def _agrees(cls, count: int | None, info: ValidationInfo) -> int | None:
        model = info.data.get("model")
        if count is not None and isinstance(model, tuple) and count != len(model):
            raise ValueError(f"expected {len(model)}, because `model` lists {len(model)}, got {count}")
        return count

    @field_validator("learns")
    @classmethod
    def _not_from_peers_alone(cls, learns: tuple[Lesson, ...]) -> tuple[Lesson, ...]:
        if all(one.source == "peers" and not (isinstance(one, KD) and one.alpha < 1) for one in learns):
            hint = "add a lesson from labels, such as {from: labels, loss: cross_entropy}, or from a network"
            raise ValueError(f"members that learn from one another alone learn nothing of the images; {hint}")
        return learns

    @field_validator("impressions")
    @classmethod
    def _have_no_labels(cls, impressions: Impressions | None, info: ValidationInfo) -> Impressions | None:
        lessons, head, view = (info.data.get(key) for key in ("learns", "head", "view"))
        asking = [f"learns[{n}] ({lesson.loss})" for n, lesson in enumerate(lessons or ()) if lesson.needs_labels]
        asking += ["head.fine_tune_epochs"] if head and head.fine_tune_epochs else []
        asking += [f"view.{key}" for key in ("per_class", "classes") if view and getattr(view, key) is not None]
        if asking and impressions is not None:
            hint = f"learn from a network alone, such as {{from: {impressions.source}, loss: kd, alpha: 1}}"
            raise ValueError(f"these images have no labels, which {', '.join(asking)} would need; {hint}")
        return impressions

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        if self.members is not None:
            return {key: fields[key] for key in ("members", "merge")}
        unused = dict.fromkeys(("view", "improve", "impressions", "quantize", "members", "merge")) | {"split": "chunks"}
        return {key: value for key, value in fields.items() if key not in unused or value != unused[key]}

    @property
    def models(self) -> tuple[str, ...]:
        """The model of each member; of a network that is no group, its one model; none of one that is merged."""
        if self.model is None:
            return ()
        return (self.model,) * (self.count or 1) if isinstance(self.model, str) else self.model

    @property
    def is_group(self) -> bool:
        """Whether this is a group, which a group of one also is, and what is merged."""
        return self.count is not None or not isinstance(self.model, str)

    @property
    def learns_in_chunks(self) -> bool:
        """Whether this is a group whose members learn independently, so that each has a loss of its own."""
        alone = self.split == "chunks" and not self.learns_the_rest
        return self.is_group and alone and all(lesson.loss in OF_MEMBERS for lesson in self.learns)

    @property
    def teachers(self) -> tuple[str, ...]:
        """The other networks that lessons, head and impressions come from, each once."""
        lessons = (source for lesson in self.learns for source in lesson.networks)
        others = (part.source for part in (self.head, self.impressions) if part and part.source)
        return tuple(dict.fromkeys([*lessons, *others]))

    @property
    def sources(self) -> tuple[str, ...]:
        """Its teachers, the network whose weights it starts with, and those that it is made of, each once."""
        start = [self.quantize.source] if self.quantize and self.quantize.source else []
        members = (split_name(member)[0] for member in self.members or ())
        return tuple(dict.fromkeys([*self.teachers, *start, *members]))

    @property
    def learns_the_rest(self) -> bool:
        """Whether it learns what another network leaves over, so that alone it says nothing."""
        return any(isinstance(lesson, MSE) and lesson.minus is not None for lesson in self.learns)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each member's dense vector."""
        return tuple(info.dense for model in self.models if (info := catalog.find(model)))


class Int8(Fields):
    """The gate of `export --int8`, and how it finds the ranges of activations."""

    max_drop_points: NotNegativeFloat = Field(0.5, description="percentage points of accuracy that int8 may lose")
    calibration: Calibration = Field(
        "minmax", description="the range that holds all values, 99.99% of them, or the one with the least squared error"
    )


class Deploy(Fields):
    """What is exported, and what must hold."""

    int8: Int8 = Int8()
    cpu_classes: Annotated[tuple[CpuClass, ...], FromList] = Field(
        (),
        max_length=16,
        description="those that int8 must hold on; without any, that of the machine that exports",
        examples=[["x86-avx2", "arm64-dotprod"]],
    )


class Bench(Fields):
    """How exported files are measured."""

    threads: int = Field(1, ge=1, le=1024)
    rounds: int = Field(5, ge=1, le=1000)
    seconds: PositiveFloat = Field(1.0, description="measured time of each file in each round")


class Reference(Fields):
    """An accuracy that somebody else printed, to stand beside ours."""

    network: str = Field(examples=["students"])
    accuracy: float = Field(ge=0, le=100, description="percent, on the test split", examples=[86.54])
    variant: str | None = Field(None, description="of a recipe with variants; without it, of all of them")
    printed: str = Field(min_length=1, description="where it is printed", examples=["Malik et al. 2021, Table 3"])


class Recipe(Fields):
    """A whole recipe. Made by `load_recipes`, `parse_recipe` or `resolved_recipe`, which check all rules."""

    name: RunName = Field(examples=["tcn4"])
    seed: Seed = 0
    seeds: Annotated[tuple[Seed, ...], FromList] = Field(
        (), max_length=100, description="run with each; not with `seed`", examples=[[0, 1, 2]]
    )
    variants: dict[Slug, dict[str, Any]] = Field(
        {},
        max_length=100,
        description="run each: its name, and what it changes",
        examples=[{"wide": {"networks.students.count": 4}}],
    )
    data: Data = Field(examples=[{"name": "fashion-mnist"}])
    networks: dict[NetworkName, Network] = Field(
        min_length=1,
        max_length=256,
        examples=[{"teacher": {"model": "tcn-teacher"}}],
        json_schema_extra={"additionalProperties": False},
    )
    deploy: Deploy = Deploy()
    bench: Bench = Bench()
    reference: Annotated[tuple[Reference, ...], FromList] = Field(
        (), max_length=1000, examples=[[{"network": "students", "accuracy": 86.54, "printed": "Table 3"}]]
    )

    @property
    def variant(self) -> str | None:
        """Which of its variants this is; None for a recipe without any, and for one that still stands for all of them."""
        label = self.name.partition("/")[2]
        return label if label in self.variants else label.rpartition(".seed")[0] or None

    def models(self, name: str) -> tuple[str, ...]:
        """The model of each backbone of a network, also of a merged one, or of one member of an ensemble."""
        name, number = split_name(name)
        members = self.networks[name].members
        if members is not None:
            return tuple(model for member in members for model in self.models(member))
        models = self.networks[name].models
        return models if number is None else (models[number],)

    def views(self, name: str) -> tuple[View | None, ...]:
        """What each backbone of a network sees, in the order of `models`."""
        name, number = split_name(name)
        network = self.networks[name]
        if network.members is not None:
            return tuple(view for member in network.members for view in self.views(member))
        return (network.view,) * (len(network.models) if number is None else 1)

    def dense(self, name: str) -> int:
        """Width of the dense vector of a network: the concatenation of those of all its backbones."""
        return sum(info.dense for model in self.models(name) if (info := catalog.find(model)))

    def resolved(self) -> dict[str, Any]:
        """Plain values for JSON with every default written out; momentum only where sgd uses it."""
        return self.model_dump(mode="json", by_alias=True)


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, by which editors complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema(by_alias=True)
