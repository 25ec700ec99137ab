"""Losses on relations: what the images of a batch are to one another, whatever the width of the dense vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from kdedge.losses.lesson import Factor, Lesson

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
