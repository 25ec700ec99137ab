"""Losses on logits: the labels' cross-entropy, Hinton's distillation in its published forms, DKD and DIST."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from kdedge.losses.lesson import ClassName, Factor, FromList, Lesson

if TYPE_CHECKING:
    from torch import Tensor


class CrossEntropy(Lesson):
    """Cross-entropy with the labels, optionally smoothed (Szegedy et al. 2016, section 7)."""

    source: Literal["labels"] = Field("labels", alias="from")
    what: Literal["logits"] = "logits"
    loss: Literal["cross_entropy"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def needs_labels(self) -> bool:
        """It learns from nothing else."""
        return True

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student logits, float [batch, classes], and labels, int64 [batch]."""
        log_p = student.log_softmax(1)
        right = log_p.gather(1, labels.unsqueeze(1)).mean()
        return -(1 - self.label_smoothing) * right - self.label_smoothing * log_p.mean()


Temperature = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]


class KD(Lesson):
    """Distillation of logits z at temperature T, with the labels mixed in by `alpha` (1: teacher only).

    `sum` is Hinton et al. 2015, section 2: alpha T^2 CE(softmax(z_t/T), softmax(z_s/T)) + (1 - alpha) CE(y, softmax(z_s)).
    `blend` is the CIFAR-10 study (Bikhazi and Cosic): one target, alpha softmax(z_t/T) + (1 - alpha) onehot(y), compared
    with softmax(z_s/T); the labels are not softened, the student is, and there is no T^2.

    `trust` makes alpha smaller for samples of which the teacher knows less: `right` to 0 where its first choice is not the
    label (conditional teacher-student learning, Meng et al. 2019), `confidence` by its largest probability, and `error` by
    the probability that it gives the label, which is exp(-CE) of its own error (after Kim et al. 2019). `standardize`
    compares logits as z-scores over the classes of a sample (Sun et al. 2024).

    With `classes`, it is all of this among those classes, as if there were no others: what a specialist for them can teach
    (after Hinton et al. 2015, section 5). Images of other classes count as 0 in the mean over the batch.
    """

    what: Literal["logits"] = "logits"
    loss: Literal["kd"] = "kd"
    temperature: Temperature = 4.0
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.9
    form: Literal["sum", "blend"] = "sum"
    trust: Literal["always", "right", "confidence", "error"] = "always"
    standardize: bool = False
    classes: Annotated[tuple[ClassName, ...], FromList, Field(min_length=1)] | None = Field(
        None, description="compare among these classes alone, by name or number", examples=[["Shirt", "Coat"]]
    )

    @property
    def needs_labels(self) -> bool:
        """Not where the teacher is believed alone, of every image and for all classes."""
        return self.alpha < 1 or self.trust != "always" or self.classes is not None

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student and teacher logits, float [batch, classes], and labels, int64 [batch]. Here `classes` are
        numbers."""
        counts: Tensor | float = 1.0
        if self.classes is not None:
            columns = labels.new_tensor(self.classes)
            its_class = labels.unsqueeze(1) == columns
            student, target, labels = student[:, columns], target[:, columns], its_class.int().argmax(1)
            counts = its_class.any(1).to(student.dtype)
        T, alpha = self.temperature, self.alpha * self._trusted(target, labels)
        compared = (_z_scores(student), _z_scores(target)) if self.standardize else (student, target)
        soft_log_p = (compared[0] / T).log_softmax(1)
        soft = -((compared[1] / T).softmax(1) * soft_log_p).sum(1)
        hard_log_p = soft_log_p if self.form == "blend" else student.log_softmax(1)
        hard = -hard_log_p.gather(1, labels.unsqueeze(1)).squeeze(1)
        losses: Tensor = alpha * (T * T if self.form == "sum" else 1.0) * soft + (1 - alpha) * hard
        return (counts * losses).mean()

    def _trusted(self, target: Tensor, labels: Tensor) -> Tensor | float:
        """Factor of alpha for each sample, float [batch] from 0 to 1."""
        if self.trust == "right":
            return (target.argmax(1) == labels).to(target.dtype)
        if self.trust == "confidence":
            return target.softmax(1).amax(1)
        return target.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1) if self.trust == "error" else 1.0


class DKD(Lesson):
    """Decoupled distillation: how sure the teacher is of the label, and what it thinks of the other classes, apart.

    Zhao et al. 2022, Eq. 7, times T^2 as in the authors' code: `alpha` KL between the two-way distributions (label, not
    label), plus `beta` KL between the distributions over the other classes alone. Add a cross_entropy lesson for labels.
    """

    what: Literal["logits"] = "logits"
    loss: Literal["dkd"] = "dkd"
    temperature: Temperature = 4.0
    alpha: Factor = 1.0
    beta: Factor = 8.0

    @property
    def needs_labels(self) -> bool:
        """They say which class is apart from the others."""
        return True

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student and teacher logits, float [batch, classes], and labels, int64 [batch]."""
        T = self.temperature
        others = labels.new_ones(student.shape).scatter(1, labels.unsqueeze(1), 0).bool()
        (label_s, rest_s, among_s), (label_t, rest_t, among_t) = (
            _decoupled(logits / T, labels, others) for logits in (student, target)
        )
        target_class = _kl(label_t, label_s) + _kl(rest_t, rest_s)
        return T * T * (self.alpha * target_class + self.beta * _kl(among_t, among_s)).mean()


class DIST(Lesson):
    """The teacher's order, not its values: 1 - Pearson's correlation of probabilities, at temperature T, times T^2.

    Huang et al. 2022, Eqs. 8 to 10: `beta` over the classes of a sample, `gamma` over the samples of a batch, a class at a
    time. Add a cross_entropy lesson for the labels.
    """

    what: Literal["logits"] = "logits"
    loss: Literal["dist"] = "dist"
    temperature: Temperature = 4.0
    beta: Factor = 2.0
    gamma: Factor = 2.0

    def __call__(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Scalar from student and teacher logits, float [batch, classes]; `labels` are not looked at."""
        T = self.temperature
        ours, theirs = ((logits / T).softmax(1) for logits in (student, target))
        between_classes = 1 - _correlation(ours, theirs).mean()
        within_classes = 1 - _correlation(ours.T, theirs.T).mean()
        return T * T * (self.beta * between_classes + self.gamma * within_classes)


def _z_scores(logits: Tensor) -> Tensor:
    """Each sample's logits with mean 0 and standard deviation 1 over the classes."""
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def _decoupled(logits: Tensor, labels: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the label [batch, 1], of all other classes together [batch, 1], and of the other classes among
    themselves [batch, classes - 1]. `others` is bool [batch, classes], false at the label."""
    rest = logits[others].view(len(logits), -1)
    everything = logits.logsumexp(1, keepdim=True)
    label = logits.gather(1, labels.unsqueeze(1))
    return label - everything, rest.logsumexp(1, keepdim=True) - everything, rest.log_softmax(1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Each row's terms of KL(p || q), float [batch], from log-probabilities [batch, n]."""
    return (log_p.exp() * (log_p - log_q)).sum(1)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of each row, float [rows]; 0 where a row does not vary."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    correlation: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
    return correlation
