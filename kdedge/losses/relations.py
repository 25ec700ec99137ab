"""Losses on relations: what the images of a batch are to one another, whatever the width of the dense vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kdedge.losses.lesson import Factor, Lesson, Part, Shape

if TYPE_CHECKING:
    from torch import Tensor


class SP(Lesson):
    """Similarity-preserving distillation: inner products of all pairs, each row scaled to length 1.

    Tung and Mori 2019, Eqs. 2 to 4: squared Frobenius norm of the difference, by the square of the batch size.
    """

    same_width = False
    what: Literal["dense"] = "dense"
    loss: Literal["sp"] = "sp"

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student and target, float [batch, any width]; `labels` are not looked at."""
        return (_rows_of_length_1(student @ student.T) - _rows_of_length_1(target @ target.T)).square().mean()


class RKD(Lesson):
    """Relational distillation: distances of pairs, as shares of their mean, and angles of triplets.

    Park et al. 2019, Eqs. 4 to 9, each by the Huber loss; averages are over all pairs and triplets, as in the authors' code.
    """

    same_width = False
    what: Literal["dense"] = "dense"
    loss: Literal["rkd"] = "rkd"
    distance: Factor = 25.0
    angle: Factor = 50.0

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student and target, float [batch, any width]; `labels` are not looked at."""
        ours, theirs = _relations(student), _relations(target)
        return self.distance * _huber(ours[0] - theirs[0]) + self.angle * _huber(ours[1] - theirs[1])


class CRD(Lesson):
    """Contrastive distillation: of all images of other classes in the batch, the teacher's image is nearest the student's.

    After Tian et al. 2020. Both dense vectors are projected linearly to `width` and scaled to length 1; the projections
    learn along. The paper tells the right pair from 16,384 images in a memory bank; here the negatives are the other
    images of the batch, of other classes, and the choice among them is a softmax of the cosines by `temperature` (van den
    Oord et al. 2018, Eq. 4), once of the student's image among the teacher's and once the other way, summed.
    """

    same_width = False
    has_parts = True
    what: Literal["dense"] = "dense"
    loss: Literal["crd"] = "crd"
    temperature: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 0.07
    width: Annotated[int, Field(ge=1, le=65_536)] = 128

    def parts(self, members: int, student: Shape, target: Shape) -> dict[str, Part]:
        """The two projections."""
        return {
            "student_weight": Part((self.width, student[0]), student[0]),
            "student_bias": Part((self.width,)),
            "target_weight": Part((self.width, target[0]), target[0]),
            "target_bias": Part((self.width,)),
        }

    @property
    def needs_labels(self) -> bool:
        """They say which samples are of another class."""
        return True

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor, **parts: Tensor) -> Tensor:
        """Scalar from student and target, float [batch, any width], and labels, int64 [batch]."""
        ours = _rows_of_length_1(student @ parts["student_weight"].T + parts["student_bias"])
        theirs = _rows_of_length_1(target @ parts["target_weight"].T + parts["target_bias"])
        same_class = labels.unsqueeze(1) == labels
        same_class.fill_diagonal_(False)
        similarity = (ours @ theirs.T / self.temperature).masked_fill(same_class, float("-inf"))
        chosen = similarity.diagonal()
        return (similarity.logsumexp(0) + similarity.logsumexp(1) - 2 * chosen).mean()


class PKT(Lesson):
    """Probabilistic knowledge transfer: how likely each image is another one's neighbour, by cosine similarity.

    Passalis and Tefas 2018, Eqs. 5 to 8, averaged over all pairs as in the authors' code, so its values are small: weights
    of some ten thousand are usual.
    """

    same_width = False
    what: Literal["dense"] = "dense"
    loss: Literal["pkt"] = "pkt"

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student and target, float [batch, any width]; `labels` are not looked at."""
        p, q = _neighbours(target), _neighbours(student)
        divergence: Tensor = (p * ((p + 1e-7) / (q + 1e-7)).log()).mean()
        return divergence


def _rows_of_length_1(rows: Tensor) -> Tensor:
    scaled: Tensor = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    return scaled


def _relations(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Distances [batch, batch] by their mean over different images, and cosines [batch, batch, batch] of the angles that
    two images form at a third, which comes first."""
    differences = vectors.unsqueeze(0) - vectors.unsqueeze(1)
    squared = differences.square().sum(2)
    apart = squared > 0
    distances = squared.where(apart, squared.new_ones(())).sqrt() * apart  # the root has no slope at 0
    directions = differences / distances.where(apart, squared.new_ones(())).unsqueeze(2)
    mean = (distances.sum() / apart.sum().clamp(min=1)).clamp(min=1e-12)
    return distances / mean, directions @ directions.mT


def _huber(difference: Tensor) -> Tensor:
    """Mean Huber loss, quadratic up to 1."""
    size = difference.abs()
    near = size.clamp(max=1)
    return (near * (size - near / 2)).mean()


def _neighbours(vectors: Tensor) -> Tensor:
    """Probability [batch, batch] that the image of a column is the neighbour of the row's; rows sum to 1."""
    directions = _rows_of_length_1(vectors)
    similarity = (directions @ directions.T + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)
