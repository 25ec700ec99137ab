"""Losses on logits: the labels' cross-entropy and Hinton's distillation in its two published forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kdedge.losses.lesson import LessonFields

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(LessonFields):
    """Cross-entropy with the labels, optionally smoothed (Szegedy et al. 2016, section 7)."""

    source: Literal["labels"] = Field("labels", alias="from")
    what: Literal["logits"] = "logits"
    loss: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student logits, float [batch, classes], and labels, int64 [batch]."""
        log_p = student.log_softmax(1)
        right = log_p.gather(1, labels.unsqueeze(1)).mean()
        return -(1 - self.label_smoothing) * right - self.label_smoothing * log_p.mean()


class KD(LessonFields):
    """Distillation of logits z at temperature T, with the labels mixed in by `alpha` (1: teacher only).

    `sum` is Hinton et al. 2015, section 2: alpha T^2 CE(softmax(z_t/T), softmax(z_s/T)) + (1 - alpha) CE(y, softmax(z_s)).
    `blend` is the CIFAR-10 study (Bikhazi and Cosic): one target, alpha softmax(z_t/T) + (1 - alpha) onehot(y), compared
    with softmax(z_s/T); the labels are not softened, the student is, and there is no T^2.
    """

    what: Literal["logits"] = "logits"
    loss: Literal["kd"] = "kd"
    temperature: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 4.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    form: Literal["sum", "blend"] = "sum"

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student and teacher logits, float [batch, classes], and labels, int64 [batch]."""
        T, alpha = self.temperature, self.alpha
        soft_log_p = (student / T).log_softmax(1)
        soft = -((target / T).softmax(1) * soft_log_p).sum(1).mean()
        hard_log_p = soft_log_p if self.form == "blend" else student.log_softmax(1)
        hard = -hard_log_p.gather(1, labels.unsqueeze(1)).mean()
        return alpha * (T * T if self.form == "sum" else 1.0) * soft + (1 - alpha) * hard
