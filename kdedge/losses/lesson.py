"""What all lessons have in common: whom they learn from, what is compared, and how much it counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Lesson(BaseModel):
    """The fields of every lesson. `from` is a Python keyword, so the attribute is `source`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    same_width: ClassVar[bool] = True  # whether the vectors that are compared must have one width

    source: str = Field(alias="from", description="`labels`, or the network that is learned from")
    weight: Weight = Field(1.0, description="factor of this lesson in the sum of all lessons")
    what: str
    loss: str

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar: the loss of a batch. Each class of the shelf has its own."""
        raise NotImplementedError
