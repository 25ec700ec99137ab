"""The recipe: networks and the lessons each learns, read from YAML into frozen classes.

A recipe is data: reading one runs nothing, and an unknown key is an error. Every problem is found at once, and each
names its line, what was given and what to write. The losses' own keys are in losses/, the rules between the parts in
recipe_rules.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
)
from pydantic_core import ErrorDetails

from kdedge import recipe_rules
from kdedge.data.catalog import DATASETS
from kdedge.errors import RecipeError
from kdedge.losses import Lesson
from kdedge.losses.logits import CrossEntropy
from kdedge.models import catalog
from kdedge.recipe_rules import LESSONS, MAX_MEMBERS
from kdedge.wording import KeyPath, explain, given, keys, unknown
from kdedge.yaml_reader import Document, assign, read, read_text


def _known_dataset(name: str) -> str:
    if name not in DATASETS:
        raise ValueError(unknown("dataset", name, DATASETS))
    return name


def _known_model(name: str) -> str:
    if catalog.find(name) is None:
        raise ValueError(unknown("model", name, catalog.names()))
    return name


def _not_reserved(name: str) -> str:
    if name in ("labels", "peers"):
        raise ValueError(f"{name!r} has a meaning in lessons; give the network another name")
    return name


def _one_or_list(value: object) -> str:
    return "list" if isinstance(value, list | tuple) else "one"


# YAML and JSON have lists, frozen classes have tuples.
_FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)

Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
NetworkName = Annotated[Slug, AfterValidator(_not_reserved)]
DatasetName = Annotated[str, AfterValidator(_known_dataset), Field(json_schema_extra={"enum": list(DATASETS)})]
ModelName = Annotated[
    str,
    AfterValidator(_known_model),
    Field(description=f"one of {', '.join(catalog.names())}", examples=[*catalog.MODELS]),
]
MemberModels = Annotated[tuple[ModelName, ...], Field(min_length=1, max_length=MAX_MEMBERS), _FromList]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class Augment(_Fields):
    """Random changes of the training images."""

    flip: bool = Field(False, description="mirror left and right, every second time")
    shift: int = Field(0, ge=0, le=8, description="move by up to that many pixels in each direction")


class Data(_Fields):
    """The images, and how the training set is cut; the test set is never touched."""

    name: DatasetName = Field(examples=["fashion-mnist"])
    split_seed: Seed = 0
    validation: int = Field(5000, ge=100, description="training images kept for selection and gates")
    calibration: int = Field(512, ge=1, description="training images kept for int8 calibration")
    limit: int | None = Field(None, ge=1, description="train on that many images only")


class Fit(_Fields):
    """How a network is trained."""

    epochs: int = Field(10, ge=1, le=100_000)
    batch_size: int = Field(128, ge=1, le=65_536)
    optimizer: Literal["adam", "sgd"] = "adam"
    lr: PositiveFloat = 1e-3
    momentum: float = Field(0.9, ge=0, le=1, description="of sgd only")
    weight_decay: NotNegativeFloat = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.0, ge=0, le=0.9, description="fraction of the steps over which lr rises from 0")
    augment: Augment = Augment()

    @field_validator("momentum")
    @classmethod
    def _sgd_only(cls, momentum: float, info: ValidationInfo) -> float:
        if info.data.get("optimizer") == "adam":  # not called when momentum is not written
            raise ValueError("adam has no momentum; remove it, or write optimizer: sgd")
        return momentum

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if key != "momentum" or self.optimizer == "sgd"}


class Head(_Fields):
    """A head that starts as another network's and is then trained alone on the labels."""

    source: str = Field(alias="from", examples=["teacher"], description="the network whose head it starts as")
    fine_tune_epochs: int = Field(0, ge=0, le=100_000)
    fine_tune_lr: PositiveFloat = 1e-3


class Network(_Fields):
    """A model, or a group of models that share the dense vector they learn in equal chunks."""

    model: Annotated[
        Annotated[ModelName, Tag("one")] | Annotated[MemberModels, Tag("list")], Discriminator(_one_or_list)
    ] = Field(examples=["tcn-student-4"])
    count: int | None = Field(None, ge=1, le=MAX_MEMBERS, description="members of the group; without it, no group")
    learns: Annotated[tuple[Annotated[Lesson, Field(discriminator="loss")], ...], _FromList] = Field(
        (CrossEntropy(),), min_length=1, max_length=64, examples=[[{"from": "teacher", "loss": "mse"}]]
    )
    fit: Fit = Fit()
    head: Head | None = None

    @field_validator("count")
    @classmethod
    def _agrees(cls, count: int | None, info: ValidationInfo) -> int | None:
        model = info.data.get("model")
        if count is not None and isinstance(model, tuple) and count != len(model):
            raise ValueError(f"expected {len(model)}, because `model` lists {len(model)}, got {count}")
        return count

    @property
    def models(self) -> tuple[str, ...]:
        """The model of each member; of a network that is no group, its one model."""
        return (self.model,) * (self.count or 1) if isinstance(self.model, str) else self.model

    @property
    def is_group(self) -> bool:
        """Whether this is a group, which a group of one also is."""
        return self.count is not None or not isinstance(self.model, str)

    @property
    def sources(self) -> tuple[str, ...]:
        """The networks that the lessons and the head learn from, each once, without the labels."""
        heads = [self.head.source] if self.head else []
        return tuple(dict.fromkeys(s for s in [*(lesson.source for lesson in self.learns), *heads] if s != "labels"))

    @property
    def dense(self) -> int:
        """Width of the dense vector; a group's is the concatenation of its members'."""
        return sum(info.dense for model in self.models if (info := catalog.find(model)))


class Int8(_Fields):
    """The gate of `export --int8`."""

    max_drop_points: NotNegativeFloat = Field(0.5, description="percentage points of accuracy that int8 may lose")


class Deploy(_Fields):
    """What is exported, and what must hold."""

    int8: Int8 = Int8()


class Bench(_Fields):
    """How exported files are measured."""

    threads: int = Field(1, ge=1, le=1024)
    rounds: int = Field(5, ge=1, le=1000)
    seconds: PositiveFloat = Field(1.0, description="measured time of each file in each round")


class Recipe(_Fields):
    """A whole recipe. Made by `load_recipe`, `parse_recipe` or `Recipe.parse`, which check all rules."""

    name: Slug = Field(examples=["tcn4"])
    seed: Seed = 0
    data: Data = Field(examples=[{"name": "fashion-mnist"}])
    networks: dict[NetworkName, Network] = Field(
        min_length=1,
        max_length=256,
        examples=[{"teacher": {"model": "tcn-teacher"}}],
        json_schema_extra={"additionalProperties": False},
    )
    deploy: Deploy = Deploy()
    bench: Bench = Bench()

    def resolved(self) -> dict[str, Any]:
        """Plain values for JSON with every default written out; momentum only where sgd uses it."""
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def parse(cls, resolved: dict[str, Any], source: str = "<recipe>") -> Recipe:
        """The recipe of plain values, as `resolved` gives them. Raises RecipeError."""
        return _build(Document(resolved), source)


_CLASSES: dict[KeyPath, type[BaseModel]] = {  # which keys may stand where; "*" is a network's name
    (): Recipe,
    ("data",): Data,
    ("networks", "*"): Network,
    ("networks", "*", "fit"): Fit,
    ("networks", "*", "fit", "augment"): Augment,
    ("networks", "*", "head"): Head,
    ("deploy",): Deploy,
    ("deploy", "int8"): Int8,
    ("bench",): Bench,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, changed by `networks.teacher.fit.epochs=2` and the like. Raises RecipeError."""
    return parse_recipe(read_text(Path(path)), str(path), overrides)


def parse_recipe(text: str, source: str = "<recipe>", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML text; `source` names it in problems. Raises RecipeError with every problem found."""
    document = read(text)
    if not document.whole:
        raise RecipeError(source, document.problems)
    for setting in overrides if isinstance(document.value, dict) else ():
        assign(document, setting, lambda path: keys(_class_at(path)))
    return _build(document, source)


QUICK_IMAGES, QUICK_EPOCHS, QUICK_DROP_POINTS = 1024, 2, 5.0


def quick(recipe: Recipe) -> Recipe:
    """The same recipe made small, to try the whole chain in under a minute; its accuracies mean nothing.

    So its gate is wide: a network that has hardly learned has logits so close that int8 changes their order.
    """
    networks = {}
    for name, network in recipe.networks.items():
        head = network.head
        if head is not None:
            head = head.model_copy(update={"fine_tune_epochs": min(head.fine_tune_epochs, QUICK_EPOCHS)})
        fit = network.fit.model_copy(update={"epochs": min(network.fit.epochs, QUICK_EPOCHS)})
        networks[name] = network.model_copy(update={"fit": fit, "head": head})
    limit = min(recipe.data.limit or math.inf, QUICK_IMAGES)
    bench = {"rounds": min(recipe.bench.rounds, 2), "seconds": min(recipe.bench.seconds, 0.1)}
    gate = Int8(max_drop_points=max(recipe.deploy.int8.max_drop_points, QUICK_DROP_POINTS))
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"limit": limit}),
            "networks": networks,
            "deploy": recipe.deploy.model_copy(update={"int8": gate}),
            "bench": recipe.bench.model_copy(update=bench),
        }
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, by which editors complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | Recipe.model_json_schema(by_alias=True)


def _build(document: Document, source: str) -> Recipe:
    """Recipe from plain values, or RecipeError with the reader's, the schema's and the rules' problems together."""
    tree, problems = document.value, list(document.problems)
    if not isinstance(tree, dict):
        hint = "a recipe is a mapping of keys and values; write at least name, data and networks"
        problems.append(document.problem((), f"expected a recipe, got {given(tree)}; {hint}"))
        raise RecipeError(source, problems)
    recipe: Recipe | None = None
    found: list[tuple[KeyPath, str]] = []
    try:
        recipe = Recipe.model_validate(tree, strict=True, by_alias=True, by_name=False)  # `from`, never `source`
    except ValidationError as error:
        for details in error.errors(include_url=False):
            path = _path(details)
            incomplete = details["type"] == "missing" and path[:-1] in document.refused
            miscounted = details["type"] == "too_short" and details["input"]  # refused entries are not counted
            if path not in document.refused and not incomplete and not miscounted:
                found.append((path, _message(details, path)))
    refused = {*document.refused, *(path for path, _ in found)}
    findings = dict.fromkeys([*found, *recipe_rules.check(tree, refused)])
    problems += [document.problem(path, message) for path, message in findings]
    if problems or recipe is None:
        raise RecipeError(source, sorted(problems, key=lambda problem: problem.line or sys.maxsize))
    return recipe


def _path(details: ErrorDetails) -> KeyPath:
    """Where an error stands in the recipe: pydantic's location without the names of unions' branches."""
    path = details["loc"]
    if path[0] == "networks":
        if path[2:] == ("[key]",) and details["type"] != "extra_forbidden":
            path = path[:2]
        elif path[2:3] == ("learns",):
            path = path[:4] + path[5:]
        elif path[2:3] == ("model",):
            path = path[:3] + path[4:]
    return (*path, "loss") if details["type"].startswith("union_tag") else path


def _message(details: ErrorDetails, path: KeyPath) -> str:
    """One of pydantic's errors in plain words, with what to write."""
    value, key = details["input"], path[-1]
    if details["type"] == "union_tag_invalid":
        return unknown("loss", str(value["loss"]), LESSONS)
    if details["type"] == "union_tag_not_found":
        return f"missing; write one of {', '.join(LESSONS)}"
    if details["type"] in ("model_type", "model_attributes_type") and len(path) in (2, 4):
        example = "network, such as {model: lenet5}" if len(path) == 2 else "lesson, such as {from: teacher, loss: kd}"
        return f"expected a {example}, got {given(value)}"
    if len(path) == 5 and path[2] == "learns":
        loss = str(details["loc"][4])
        if key == "from" and loss == "cross_entropy":
            return f"cross_entropy learns from labels, not from {given(value)}; from a network learn with kd or mse"
        if details["type"] == "missing":
            return "missing; write the name of the network that is learned from"
        return explain(details, key, LESSONS[loss])
    return explain(details, key, _class_at(path[:-1]))


def _class_at(path: KeyPath) -> type[BaseModel]:
    if path[:1] == ("networks",) and len(path) > 1:
        path = ("networks", "*", *path[2:])
    return _CLASSES.get(path, BaseModel)  # a class without keys for lists and for what nobody declared
