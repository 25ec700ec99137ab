"""Losses on the dense vector, the input of the head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kdedge.losses.lesson import Lesson

if TYPE_CHECKING:
    from torch import Tensor


class MSE(Lesson):
    """Mean squared error between the student's dense vector and the one it learns.

    Malik et al. 2021, Eq. 2, divided by the width of the vector as in the authors' code, so that `weight` means the
    same at every width. A member of a group is compared with its own chunk of the vector (Eq. 3).

    With `minus`, what is learned is the vector less that of another network: what the other one leaves over (residual
    distillation, Gao et al. 2020).
    """

    what: Literal["dense"] = "dense"
    loss: Literal["mse"] = "mse"
    minus: str | None = Field(None, examples=["student"], description="the network whose dense vector is subtracted")

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks whose outputs it needs."""
        return super().networks if self.minus is None else (*super().networks, self.minus)

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student and target, float [batch, width]; `labels` are not looked at."""
        return (student - target).square().mean()
