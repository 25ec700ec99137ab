"""What all lessons have in common: whom they learn from, and how much it counts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LessonFields(BaseModel):
    """The fields of every lesson. `from` is a Python keyword, so the attribute is `source`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    source: str = Field(alias="from", description="`labels`, or the network that is learned from")
    weight: Weight = Field(1.0, description="factor of this lesson in the sum of all lessons")
