"""What all lessons have in common: whom they learn from, what is compared, and how much it counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
)

from kdedge.wording import given

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]

NOT_NETWORKS = ("labels", "peers")  # what `from` may name beside networks; peers: the other members of an ensemble

# YAML and JSON have lists, frozen classes have tuples.
FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)


def _name_or_number(value: object) -> object:
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"expected the name or the number of a class, got {given(value)}")
    return value


ClassName = Annotated[str | int, BeforeValidator(_name_or_number)]


def one_or_list(value: object) -> str:
    """Which branch of a union a value belongs to, so that only its problems are told."""
    return "list" if isinstance(value, list | tuple) else "one"


Shape = tuple[int, ...]  # of what is compared, without the batch: (width,) or (channels, height, width)


@dataclass(frozen=True)
class Part:
    """A tensor that a lesson itself learns while it teaches, such as a layer of a discriminator.

    It is drawn as the weights of a linear layer with so many `inputs`, uniformly up to 1 / sqrt(inputs); without inputs
    it starts at 0.
    """

    shape: Shape
    inputs: int = 0


class Lesson(BaseModel):
    """The fields of every lesson. `from` is a Python keyword, so the attribute is `source`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    same_width: ClassVar[bool] = True  # whether the vectors that are compared must have one width
    has_parts: ClassVar[bool] = False  # whether it learns something itself, see `parts`

    source: Annotated[
        Annotated[str, Tag("one")]
        | Annotated[tuple[str, ...], FromList, Field(min_length=1, max_length=64), Tag("list")],
        Discriminator(one_or_list),
    ] = Field(
        alias="from", description="`labels`, `peers`, the network that is learned from, or several: the mean over them"
    )
    weight: Weight = Field(1.0, description="factor of this lesson in the sum of all lessons")
    drop: int | None = Field(
        None, ge=1, le=63, description="of several networks, how many each batch leaves out, drawn anew"
    )
    what: str
    loss: str

    @property
    def sources(self) -> tuple[str, ...]:
        """All that it learns from: `labels`, `peers`, or networks."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks whose outputs it needs."""
        return tuple(source for source in self.sources if source not in NOT_NETWORKS)

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = handler(self)
        return {key: value for key, value in fields.items() if value is not None}

    @property
    def needs_labels(self) -> bool:
        """Whether the formula looks at the labels of the images."""
        return False

    def share(self) -> Lesson:
        """This lesson with the weight that each of its sources has, of those that are not dropped.

        The mean of the losses is, but for a constant, the loss on the mean of the targets, where a target enters linearly: kd
        from several networks is kd from the mean of their softened outputs (Hinton et al. 2015, section 2).
        """
        left = len(self.sources) - (self.drop or 0)
        return self if left == 1 else self.model_copy(update={"weight": self.weight / left})

    def parts(self, members: int, student: Shape, target: Shape) -> dict[str, Part]:
        """What the lesson learns while it teaches a group of so many members; most lessons learn nothing.

        The parts are trained with the network, are arguments of the lesson's call by their names, and end with the stage.
        """
        return {}

    @property
    def output(self) -> str:
        """Which of the student's outputs it compares: dense, logits, or a layer."""
        return self.what

    @property
    def target(self) -> str:
        """Which of its source's outputs it compares that with."""
        return self.what

    @property
    def parts_lr(self) -> float:
        """Factor of the learning rate for its parts."""
        return 1.0

    if TYPE_CHECKING:  # each class of the shelf has its own

        def __call__(self, *tensors: Any, **parts: Any) -> Tensor:
            """Scalar: the loss of a batch, from student, target and labels, and from its parts."""
