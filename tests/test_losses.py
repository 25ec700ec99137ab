"""Each loss against its published formula, written out in numpy, and against a case computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdedge.losses import LOSSES, Lesson
from kdedge.losses.dense import MSE
from kdedge.losses.logits import DIST, DKD, KD, CrossEntropy
from kdedge.losses.relations import PKT, RKD, SP

Array = NDArray[np.float64]


def taught(kind: type[Lesson], **fields: Any) -> Lesson:
    return kind.model_validate({"from": "teacher", **fields})


def drawn(batch: int = 7, classes: int = 10) -> tuple[Array, Array, NDArray[np.int64]]:
    """Student and teacher logits, and labels."""
    random = np.random.default_rng(0)
    return random.normal(0, 3, (batch, classes)), random.normal(0, 5, (batch, classes)), np.arange(batch) % classes


def loss_of(lesson: Lesson, student: Array, target: Array | None, labels: NDArray[np.int64]) -> float:
    teacher = None if target is None else torch.from_numpy(target)
    return float(lesson(torch.from_numpy(student), teacher, torch.from_numpy(labels)))  # type: ignore[arg-type]


# The formulas, sample by sample and class by class


def probabilities(logits: Array, temperature: float = 1.0) -> Array:
    powers = np.exp(logits / temperature)
    return powers / powers.sum(1, keepdims=True)


def cross_entropy(target: Array, p: Array) -> float:
    return float(np.mean([-sum(target[i, j] * math.log(p[i, j]) for j in range(p.shape[1])) for i in range(len(p))]))


def onehot(labels: NDArray[np.int64], classes: int) -> Array:
    return np.array([[float(label == j) for j in range(classes)] for label in labels])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_its_formula(smoothing: float) -> None:
    """Szegedy et al. 2016: the label gets 1 - e, and e is spread over all classes, the label's among them."""
    student, _, labels = drawn()
    target = (1 - smoothing) * onehot(labels, 10) + smoothing / 10
    found = loss_of(CrossEntropy(label_smoothing=smoothing), student, None, labels)
    assert found == pytest.approx(cross_entropy(target, probabilities(student)), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_kd_sum_is_its_formula(temperature: float, alpha: float) -> None:
    """Hinton et al. 2015: alpha T^2 CE(teacher at T, student at T) + (1 - alpha) CE(labels, student at 1)."""
    student, teacher, labels = drawn()
    soft = cross_entropy(probabilities(teacher, temperature), probabilities(student, temperature))
    hard = cross_entropy(onehot(labels, 10), probabilities(student))
    found = loss_of(taught(KD, temperature=temperature, alpha=alpha), student, teacher, labels)
    assert found == pytest.approx(alpha * temperature**2 * soft + (1 - alpha) * hard, rel=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_kd_blend_is_its_formula(temperature: float, alpha: float) -> None:
    """The CIFAR-10 study: CE(alpha teacher at T + (1 - alpha) labels as they are, student at T), without T^2."""
    student, teacher, labels = drawn()
    target = alpha * probabilities(teacher, temperature) + (1 - alpha) * onehot(labels, 10)
    expected = cross_entropy(target, probabilities(student, temperature))
    found = loss_of(taught(KD, temperature=temperature, alpha=alpha, form="blend"), student, teacher, labels)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("form", ["sum", "blend"])
@pytest.mark.parametrize("trust", ["right", "confidence", "error"])
def test_kd_trusts_the_teacher_sample_by_sample(trust: str, form: str) -> None:
    """As if each sample had been taught alone, with an alpha of its own."""
    student, teacher, labels = drawn(40)
    losses = []
    for i in range(40):
        p = probabilities(teacher[i : i + 1])[0]
        knows = {"right": float(p.argmax() == labels[i]), "confidence": p.max(), "error": p[labels[i]]}[trust]
        lesson = taught(KD, alpha=0.8 * knows, form=form, temperature=3)
        losses.append(loss_of(lesson, student[i : i + 1], teacher[i : i + 1], labels[i : i + 1]))
    found = loss_of(taught(KD, alpha=0.8, trust=trust, form=form, temperature=3), student, teacher, labels)
    assert found == pytest.approx(np.mean(losses), rel=1e-12)


@pytest.mark.parametrize("form", ["sum", "blend"])
def test_kd_from_several_networks_is_kd_from_the_mean_of_their_softened_outputs(form: str) -> None:
    """Hinton et al. 2015, section 2, on the arithmetic mean of the ensemble's predictive distributions."""
    student, first, labels = drawn()
    second, third = first[::-1].copy(), -first
    soft = (probabilities(first, 3) + probabilities(second, 3) + probabilities(third, 3)) / 3
    blend = cross_entropy(0.7 * soft + 0.3 * onehot(labels, 10), probabilities(student, 3))
    summed = 0.7 * 9 * cross_entropy(soft, probabilities(student, 3))
    summed += 0.3 * cross_entropy(onehot(labels, 10), probabilities(student))
    lesson = KD.model_validate({"from": ["a", "b", "c"], "weight": 2, "temperature": 3, "alpha": 0.7, "form": form})
    share = lesson.share()
    found = sum(share.weight * loss_of(share, student, target, labels) for target in (first, second, third))
    assert found == pytest.approx(2 * (blend if form == "blend" else summed), rel=1e-12)


@pytest.mark.parametrize("form", ["sum", "blend"])
def test_kd_among_some_classes_is_kd_as_if_there_were_no_others(form: str) -> None:
    """Of the images of these classes alone; the mean is still over all images, here 7 of which 3 are of them."""
    student, teacher, labels = drawn()
    some, images = [6, 2, 9, 3], [2, 3, 6]  # the label of image n is n
    inside = [logits[np.ix_(images, some)] for logits in (student, teacher)]
    soft = cross_entropy(probabilities(inside[1], 3), probabilities(inside[0], 3))
    own = onehot(np.array([1, 3, 0]), 4)
    blend = cross_entropy(0.7 * probabilities(inside[1], 3) + 0.3 * own, probabilities(inside[0], 3))
    summed = 0.7 * 9 * soft + 0.3 * cross_entropy(own, probabilities(inside[0]))
    found = loss_of(taught(KD, temperature=3, alpha=0.7, form=form, classes=some), student, teacher, labels)
    assert found == pytest.approx(3 / 7 * (blend if form == "blend" else summed), rel=1e-12)


def test_kd_among_classes_that_no_image_has_is_0() -> None:
    student, teacher, labels = drawn()
    assert loss_of(taught(KD, classes=[8, 9]), student, teacher, labels) == 0


def test_kd_standardized_is_its_formula() -> None:
    """Sun et al. 2024: z-scores in the softened part, the student's own logits against the labels."""
    student, teacher, labels = drawn()
    scores = [(z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True) for z in (teacher, student)]
    soft = cross_entropy(probabilities(scores[0], 2), probabilities(scores[1], 2))
    hard = cross_entropy(onehot(labels, 10), probabilities(student))
    found = loss_of(taught(KD, temperature=2, alpha=0.7, standardize=True), student, teacher, labels)
    assert found == pytest.approx(0.7 * 4 * soft + 0.3 * hard, rel=1e-6)


def test_kd_standardized_asks_for_the_order_of_logits_not_for_their_size() -> None:
    student, teacher, labels = drawn()
    lesson = taught(KD, alpha=1, standardize=True)
    assert loss_of(lesson, 5 * student + 3, teacher, labels) == pytest.approx(loss_of(lesson, student, teacher, labels))


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 2.0, 1.0), (3.0, 0.0, 2.0)])
def test_dkd_is_its_formula(alpha: float, beta: float, temperature: float) -> None:
    """Zhao et al. 2022, Eqs. 1 to 7, class by class."""
    student, teacher, labels = drawn()
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    total = 0.0
    for i, label in enumerate(labels):
        rest = [j for j in range(10) if j != label]
        total += alpha * p[i, label] * math.log(p[i, label] / q[i, label])
        total += alpha * (1 - p[i, label]) * math.log((1 - p[i, label]) / (1 - q[i, label]))
        for j in rest:
            among_p, among_q = p[i, j] / p[i, rest].sum(), q[i, j] / q[i, rest].sum()
            total += beta * among_p * math.log(among_p / among_q)
    found = loss_of(taught(DKD, alpha=alpha, beta=beta, temperature=temperature), student, teacher, labels)
    assert found == pytest.approx(temperature**2 * total / len(labels), rel=1e-9)


def test_dkd_with_the_teachers_own_weights_is_kd() -> None:
    """Zhao et al. 2022, Eq. 6: KL = TCKD + (1 - p_label) NCKD, so for one sample beta = 1 - p_label gives KL."""
    student, teacher, labels = drawn(1)
    p, q = probabilities(teacher), probabilities(student)
    found = loss_of(taught(DKD, alpha=1, beta=1 - p[0, labels[0]], temperature=1), student, teacher, labels)
    assert found == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-9)


@pytest.mark.parametrize(("beta", "gamma", "temperature"), [(2.0, 2.0, 4.0), (1.0, 0.0, 1.0), (0.0, 3.0, 2.0)])
def test_dist_is_its_formula(beta: float, gamma: float, temperature: float) -> None:
    """Huang et al. 2022, with numpy's correlation of rows and of columns."""
    student, teacher, labels = drawn()
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    rows = np.mean([np.corrcoef(p[i], q[i])[0, 1] for i in range(len(p))])
    columns = np.mean([np.corrcoef(p[:, j], q[:, j])[0, 1] for j in range(10)])
    found = loss_of(taught(DIST, beta=beta, gamma=gamma, temperature=temperature), student, teacher, labels)
    assert found == pytest.approx(temperature**2 * (beta * (1 - rows) + gamma * (1 - columns)), rel=1e-6)


def test_mse_is_its_formula() -> None:
    student, teacher, labels = drawn(5, 12)
    expected = sum((student[i, j] - teacher[i, j]) ** 2 for i in range(5) for j in range(12)) / 60
    assert loss_of(taught(MSE), student, teacher, labels) == pytest.approx(expected, rel=1e-12)


def vectors() -> tuple[Array, Array]:
    """A student's and a teacher's dense vectors of different widths."""
    random = np.random.default_rng(1)
    return random.normal(0, 1, (6, 4)), random.normal(0, 2, (6, 9))


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) < 1 else abs(difference) - 0.5


def test_sp_is_its_formula() -> None:
    """Tung and Mori 2019: || G_t - G_s ||_F^2 / b^2, G the matrix of inner products with rows of length 1."""
    gram = [v @ v.T for v in vectors()]
    rows = [g / np.linalg.norm(g, axis=1, keepdims=True) for g in gram]
    expected = np.linalg.norm(rows[0] - rows[1], "fro") ** 2 / 36
    assert loss_of(taught(SP), *vectors(), LABEL) == pytest.approx(expected, rel=1e-9)


def test_rkd_is_its_formula() -> None:
    """Park et al. 2019: pair by pair, triplet by triplet."""
    distances, angles = [], []
    for v in vectors():
        apart = [[float(np.linalg.norm(a - b)) for b in v] for a in v]
        mean = sum(map(sum, apart)) / 30  # of the pairs of different images
        distances.append([[d / mean for d in row] for row in apart])
        e = [[(b - a) / np.linalg.norm(b - a) if i != j else 0 * a for j, b in enumerate(v)] for i, a in enumerate(v)]
        angles.append([[[float(e[i][j] @ e[i][k]) for k in range(6)] for j in range(6)] for i in range(6)])
    by_distance = np.mean([huber(distances[0][i][j] - distances[1][i][j]) for i in range(6) for j in range(6)])
    every = [(i, j, k) for i in range(6) for j in range(6) for k in range(6)]
    by_angle = np.mean([huber(angles[0][i][j][k] - angles[1][i][j][k]) for i, j, k in every])
    for distance, angle in ((25.0, 50.0), (1.0, 0.0), (0.0, 1.0)):
        found = loss_of(taught(RKD, distance=distance, angle=angle), *vectors(), LABEL)
        assert found == pytest.approx(distance * by_distance + angle * by_angle, rel=1e-9)


def test_pkt_is_its_formula() -> None:
    """Passalis and Tefas 2018: KL between the rows of (cosine + 1) / 2, each row scaled to sum 1, by b^2."""
    p, q = (
        np.array([[(a @ b / np.linalg.norm(a) / np.linalg.norm(b) + 1) / 2 for b in v] for a in v])
        for v in reversed(vectors())
    )
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = sum(p[i, j] * math.log(p[i, j] / q[i, j]) for i in range(6) for j in range(6)) / 36
    assert loss_of(taught(PKT), *vectors(), LABEL) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", [SP, RKD, PKT])
def test_relations_do_not_change_when_the_space_is_turned(kind: type[Lesson]) -> None:
    student, _ = vectors()
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))[0]
    assert loss_of(taught(kind), student, 3 * student @ turn, LABEL) == pytest.approx(0, abs=1e-9)


def test_rkd_of_equal_images_is_finite_and_has_a_gradient() -> None:
    student = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    taught(RKD)(student, torch.ones(4, 3, dtype=torch.float64), torch.zeros(4)).backward()
    assert student.grad is not None and student.grad.isfinite().all()


# By hand: the student's logits give probabilities 3/4 and 1/4 at T = 1; the teacher's 9/10 and 1/10 at T = 2.

STUDENT = np.log([[3.0, 1.0]])
TEACHER = 2 * np.log([[9.0, 1.0]])
LABEL = np.array([1])
ROOT = math.sqrt(3)  # at T = 2 the student's probabilities are ROOT / (ROOT + 1) and 1 / (ROOT + 1)


def test_cross_entropy_by_hand() -> None:
    assert loss_of(CrossEntropy(), STUDENT, None, LABEL) == pytest.approx(math.log(4))
    smoothed = loss_of(CrossEntropy(label_smoothing=0.1), STUDENT, None, LABEL)  # the target is 0.05 and 0.95
    assert smoothed == pytest.approx(0.05 * math.log(4 / 3) + 0.95 * math.log(4))


def test_kd_by_hand() -> None:
    soft = 0.9 * math.log((ROOT + 1) / ROOT) + 0.1 * math.log(ROOT + 1)
    found = loss_of(taught(KD, temperature=2, alpha=0.5), STUDENT, TEACHER, LABEL)
    assert found == pytest.approx(0.5 * 4 * soft + 0.5 * math.log(4))
    # The label is a whole one in the target: it adds log(ROOT + 1) once, not its softened share.
    found = loss_of(taught(KD, temperature=2, alpha=0.5, form="blend"), STUDENT, TEACHER, LABEL)
    assert found == pytest.approx(0.5 * soft + 0.5 * math.log(ROOT + 1))


def test_kd_by_hand_where_the_teacher_is_wrong() -> None:
    """The label is the second class, the teacher's choice the first: only the label counts."""
    assert loss_of(taught(KD, temperature=2, alpha=0.5, trust="right"), STUDENT, TEACHER, LABEL) == pytest.approx(
        math.log(4)
    )


def test_kd_among_two_classes_by_hand() -> None:
    """Of logits log 3, 0 and whatever, the student's 0 and 0: the teacher gives 3/4 and 1/4, the student a half each."""
    student, teacher = np.array([[0.0, 5.0, 0.0]]), np.array([[math.log(3), -7.0, 0.0]])
    found = loss_of(taught(KD, temperature=1, alpha=1, classes=[0, 2]), student, teacher, np.array([2]))
    assert found == pytest.approx(math.log(2))


def test_dkd_by_hand() -> None:
    """Two classes: there is one other class, so nothing to decide among the others, and KL over two is left."""
    p, q = 0.9, ROOT / (ROOT + 1)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert loss_of(taught(DKD, temperature=2, alpha=0.5), STUDENT, TEACHER, LABEL) == pytest.approx(4 * 0.5 * kl)


def test_dist_by_hand() -> None:
    """Two samples of two classes: each row and column goes up or down alike, a correlation of 1, or against, of -1."""
    student, same, against = (
        np.array([[2.0, 1.0], [0.0, 3.0]]),
        np.array([[5.0, 1.0], [0.0, 1.0]]),
        np.array([[0.0, 1.0], [3.0, 1.0]]),
    )
    assert loss_of(taught(DIST, temperature=1), student, same, LABEL) == pytest.approx(0, abs=1e-6)
    assert loss_of(taught(DIST, temperature=1, beta=1, gamma=3), student, against, LABEL) == pytest.approx(
        1 * 2 + 3 * 2, rel=1e-6
    )


def test_relations_by_hand() -> None:
    """Two images, at right angles for the student and alike for the teacher."""
    student, alike = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    assert loss_of(taught(SP), student, alike, LABEL) == pytest.approx((2 * (1 - half) ** 2 + 2 * half**2) / 4)
    # Neighbours: the student's rows are 2/3 and 1/3, the teacher's 1/2 and 1/2.
    assert loss_of(taught(PKT), student, alike, LABEL) == pytest.approx(
        (math.log(3 / 4) + math.log(3 / 2)) / 4, rel=1e-5
    )
    # The student's distance is its own mean, the teacher's is 0.
    assert loss_of(taught(RKD, distance=1, angle=0), student, alike, LABEL) == pytest.approx(2 * huber(1) / 4)


def test_mse_by_hand() -> None:
    found = loss_of(taught(MSE), np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.0, 0.0], [0.0, 8.0]]), LABEL)
    assert found == (0 + 4 + 9 + 16) / 4


def test_defaults_are_hintons() -> None:
    lesson = taught(KD)
    assert (lesson.temperature, lesson.alpha, lesson.form, lesson.weight) == (4.0, 0.9, "sum", 1.0)


def test_alpha_0_of_sum_is_plain_cross_entropy() -> None:
    student, teacher, labels = drawn()
    assert loss_of(taught(KD, alpha=0.0, temperature=7), student, teacher, labels) == loss_of(
        CrossEntropy(), student, None, labels
    )


@pytest.mark.parametrize("form", ["sum", "blend"])
def test_alpha_1_does_not_look_at_the_labels(form: str) -> None:
    student, teacher, labels = drawn()
    lesson = taught(KD, alpha=1.0, form=form)
    assert loss_of(lesson, student, teacher, labels) == loss_of(lesson, student, teacher, (labels + 3) % 10)


def test_t_squared_keeps_the_size_of_the_gradient() -> None:
    """Hinton et al. 2015, section 2: at high T the gradient is (z_s - z_t) / classes, for logits of mean zero."""
    student, teacher, labels = drawn()
    student, teacher = (logits - logits.mean(1, keepdims=True) for logits in (student, teacher))
    tensor = torch.from_numpy(student).requires_grad_()
    taught(KD, temperature=1000, alpha=1)(tensor, torch.from_numpy(teacher), torch.from_numpy(labels)).backward()
    assert tensor.grad is not None
    np.testing.assert_allclose(tensor.grad.numpy(), (student - teacher) / 10 / len(student), rtol=0.02, atol=1e-3)


def test_large_logits_give_finite_losses() -> None:
    student, teacher, labels = drawn()
    for lesson in (
        CrossEntropy(),
        taught(KD),
        taught(KD, form="blend"),
        taught(KD, standardize=True),
        taught(KD, trust="error"),
        taught(DKD),
        taught(DIST),
    ):
        assert math.isfinite(loss_of(lesson, 1e4 * student, 1e4 * teacher, labels))


EVERY_KIND = [
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.2),
    taught(KD, temperature=3, alpha=0.6),
    taught(KD, temperature=3, alpha=0.0),
    taught(KD, temperature=3, alpha=1.0),
    taught(KD, temperature=3, alpha=0.6, form="blend"),
    taught(KD, temperature=3, alpha=0.6, trust="right"),
    taught(KD, temperature=3, alpha=0.6, classes=[0, 2, 3]),
    taught(KD, temperature=3, alpha=1.0, classes=[0, 2, 3]),
    taught(KD, temperature=3, alpha=1.0, trust="confidence"),
    taught(KD, temperature=3, alpha=0.6, trust="confidence", standardize=True),
    taught(DKD, temperature=3),
    taught(DIST, temperature=3),
    taught(MSE),
    taught(SP),
    taught(RKD),
    taught(PKT),
]


@pytest.mark.parametrize("lesson", EVERY_KIND, ids=repr)
def test_gradients(lesson: Lesson) -> None:
    """Against differences of the loss itself, in float64."""
    student, teacher, labels = drawn(3, 5)
    target = None if isinstance(lesson, CrossEntropy) else torch.from_numpy(teacher)
    right = torch.from_numpy(labels)
    assert torch.autograd.gradcheck(lambda z: lesson(z, target, right), torch.from_numpy(student).requires_grad_())  # type: ignore[arg-type]


def test_a_loss_that_has_parts_says_so() -> None:
    assert [kind for kind in LOSSES.values() if kind.has_parts != (kind.parts is not Lesson.parts)] == []


def test_the_table_names_each_loss_as_recipes_do() -> None:
    assert {name: kind.model_fields["loss"].default for name, kind in LOSSES.items()} == {name: name for name in LOSSES}


@pytest.mark.parametrize("lesson", EVERY_KIND, ids=repr)
def test_a_lesson_says_whether_it_looks_at_the_labels(lesson: Lesson) -> None:
    student, teacher, labels = drawn()
    target = None if isinstance(lesson, CrossEntropy) else teacher
    same = loss_of(lesson, student, target, labels) == loss_of(lesson, student, target, (labels + 3) % 10)
    assert lesson.needs_labels != same
