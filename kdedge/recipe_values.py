"""What a single value of a recipe may be: names that are known, and numbers within limits."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, StringConstraints, Tag

from kdedge.data.catalog import DATASETS
from kdedge.devices import CPU_CLASSES
from kdedge.losses.lesson import NOT_NETWORKS, FromList, one_or_list
from kdedge.models import catalog
from kdedge.rules.recipe import MAX_MEMBERS
from kdedge.wording import unknown


def _known_dataset(name: str) -> str:
    if name not in DATASETS:
        raise ValueError(unknown("dataset", name, DATASETS))
    return name


def _known_model(name: str) -> str:
    if catalog.find(name) is None:
        raise ValueError(unknown("model", name, catalog.names()))
    return name


def _known_cpu_class(name: str) -> str:
    if name not in CPU_CLASSES:
        raise ValueError(unknown("CPU class", name, CPU_CLASSES))
    return name


def _not_reserved(name: str) -> str:
    if name in NOT_NETWORKS:
        raise ValueError(f"{name!r} has a meaning in lessons; give the network another name")
    return name


Slug = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}$")]
# A folder within the folder of runs; of a variant with a seed: tcn4/wide.seed1
RunName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,63}(/[a-z0-9][a-z0-9._-]{0,95})?$")]
NetworkName = Annotated[Slug, AfterValidator(_not_reserved)]
DatasetName = Annotated[str, AfterValidator(_known_dataset), Field(json_schema_extra={"enum": list(DATASETS)})]
ModelName = Annotated[
    str,
    AfterValidator(_known_model),
    Field(description=f"one of {', '.join(catalog.names())}", examples=[*catalog.MODELS]),
]
CpuClass = Annotated[str, AfterValidator(_known_cpu_class), Field(json_schema_extra={"enum": list(CPU_CLASSES)})]
MemberModels = Annotated[tuple[ModelName, ...], Field(min_length=1, max_length=MAX_MEMBERS), FromList]
OneOrMoreModels = Annotated[
    Annotated[ModelName, Tag("one")] | Annotated[MemberModels, Tag("list")], Discriminator(one_or_list)
]
Calibration = Literal["minmax", "percentile", "mse"]  # how ranges are found, as exporters/calibration.py has it
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
