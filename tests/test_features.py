"""Each lesson on maps, and the contrastive one, against its published formula in numpy, by hand, and by its gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kdedge.losses import Lesson
from kdedge.losses.features import VID, Attention, FitNet
from kdedge.losses.relations import CRD

Array = NDArray[np.float64]

LABELS = np.array([0, 1, 1, 2, 0])


def taught(kind: type[Lesson], **fields: Any) -> Lesson:
    layers = {} if kind is CRD else {"layer": "conv2", "from_layer": "conv1"}
    return kind.model_validate({"from": "teacher", **layers, **fields})


def drawn(lesson: Lesson) -> tuple[Array, Array, dict[str, Array]]:
    """What student and teacher give, 3 and 4 channels of 2 x 5 or as many values, and the lesson's parts."""
    random = np.random.default_rng(0)
    size = () if isinstance(lesson, CRD) else (2, 5)
    parts = {name: random.normal(0, 0.7, part.shape) for name, part in lesson.parts(1, (3, *size), (4, *size)).items()}
    return random.normal(0, 1, (5, 3, *size)), random.normal(0, 1, (5, 4, *size)), parts


def loss_of(lesson: Lesson, student: Array, target: Array, parts: dict[str, Array]) -> float:
    tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
    return float(lesson(torch.from_numpy(student), torch.from_numpy(target), torch.from_numpy(LABELS), **tensors))


def convolved(maps: Array, weight: Array) -> Array:
    """A 1x1 convolution."""
    return np.einsum("oi,bihw->bohw", weight, maps)


def test_fitnet_is_its_formula() -> None:
    """Romero et al. 2015, Eq. 3, for a regressor of 1x1: mean of (r(student) - teacher)^2."""
    lesson = taught(FitNet)
    student, target, parts = drawn(lesson)
    hint = convolved(student, parts["weight"]) + parts["bias"].reshape(1, 4, 1, 1)
    assert loss_of(lesson, student, target, parts) == pytest.approx(np.mean((hint - target) ** 2), rel=1e-12)


def test_attention_is_its_formula() -> None:
    """Zagoruyko and Komodakis 2017, Eq. 2: || Q_s / |Q_s| - Q_t / |Q_t| ||^2 of each sample, by places and samples."""
    lesson = taught(Attention)
    student, target, parts = drawn(lesson)
    total = 0.0
    for s, t in zip(student, target, strict=True):
        q = [(maps**2).sum(0).ravel() for maps in (s, t)]
        total += np.linalg.norm(q[0] / np.linalg.norm(q[0]) - q[1] / np.linalg.norm(q[1])) ** 2
    assert loss_of(lesson, student, target, parts) == pytest.approx(total / (5 * 10), rel=1e-9)


def test_vid_is_its_formula() -> None:
    """Ahn et al. 2019: log of the variance, and squared error by it, halved, for each value."""
    lesson = taught(VID)
    student, target, parts = drawn(lesson)
    hidden = np.maximum(convolved(student, parts["weight0"]), 0)
    mean = convolved(np.maximum(convolved(hidden, parts["weight1"]), 0), parts["weight2"])
    raw = parts["variance"] + math.log(math.exp(5 - 1e-5) - 1)
    variance = (np.log(1 + np.exp(raw)) + 1e-5).reshape(1, 4, 1, 1)
    expected = np.mean(0.5 * ((target - mean) ** 2 / variance + np.log(variance)))
    assert loss_of(lesson, student, target, parts) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_crd_is_its_formula(temperature: float) -> None:
    """Softmax over the images of other classes and the image itself, student to teacher and teacher to student."""
    lesson = taught(CRD, temperature=temperature, width=6)
    student, target, parts = drawn(lesson)
    s, t = (
        vectors @ parts[f"{name}_weight"].T + parts[f"{name}_bias"]
        for name, vectors in (("student", student), ("target", target))
    )
    cosine = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in t] for a in s]) / temperature
    total = 0.0
    for i in range(5):
        others = [j for j in range(5) if LABELS[j] != LABELS[i] or j == i]
        total -= cosine[i, i] - math.log(sum(math.exp(cosine[i, j]) for j in others))
        total -= cosine[i, i] - math.log(sum(math.exp(cosine[j, i]) for j in others))
    assert loss_of(lesson, student, target, parts) == pytest.approx(total / 5, rel=1e-9)


# By hand


def ones(*shape: int) -> Array:
    return np.ones(shape)


def test_fitnet_by_hand() -> None:
    """Two channels of 1 and a regressor of 2, 3 and 1: 6, where the teacher has 4."""
    found = loss_of(
        taught(FitNet), ones(5, 2, 1, 1), 4 * ones(5, 1, 1, 1), {"weight": np.array([[2.0, 3]]), "bias": ones(1, 1)}
    )
    assert found == 4


def test_attention_by_hand() -> None:
    """All of the student's on the left, the teacher's the same on both sides: lengths (1, 0) and (r, r), r = sqrt(1/2)."""
    student = np.tile([3.0, 0.0], (5, 1)).reshape(5, 1, 1, 2)
    root = math.sqrt(0.5)
    assert loss_of(taught(Attention), student, -2 * ones(5, 4, 1, 2), {}) == pytest.approx(
        ((1 - root) ** 2 + root**2) / 2
    )


def test_vid_by_hand() -> None:
    """The variance begins at 5, and weights of 1 give a mean of 1 where the teacher has 3."""
    parts = {f"weight{n}": ones(1, 1) for n in range(3)} | {"variance": np.zeros((1, 1))}
    found = loss_of(taught(VID), ones(5, 1, 1, 1), 3 * ones(5, 1, 1, 1), parts)
    assert found == pytest.approx(0.5 * (4 / 5 + math.log(5)), rel=1e-9)


def test_crd_by_hand() -> None:
    """Everything is one direction, so all choices are even: among 3 others of 5, of 4 where the class is alone."""
    parts = {name: ones(*part.shape) for name, part in taught(CRD).parts(1, (3,), (4,)).items()}
    counts = [4, 4, 4, 5, 4]  # images of other classes, and itself
    expected = 2 * np.mean(np.log(counts))
    assert loss_of(taught(CRD), ones(5, 3), ones(5, 4), parts) == pytest.approx(expected)


# Gradients


@pytest.mark.parametrize("lesson", [taught(FitNet), taught(Attention), taught(VID), taught(CRD, width=6)], ids=repr)
def test_gradients_of_student_and_parts(lesson: Lesson) -> None:
    """Against differences of the loss itself, in float64."""
    student, target, parts = drawn(lesson)
    names = list(parts)
    arguments = [torch.from_numpy(values).requires_grad_() for values in (student, *parts.values())]

    def loss(student: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        named = dict(zip(names, values, strict=True))
        return lesson(student, torch.from_numpy(target), torch.from_numpy(LABELS), **named)

    assert torch.autograd.gradcheck(loss, arguments)


@pytest.mark.parametrize("lesson", [taught(FitNet), taught(Attention), taught(VID), taught(CRD)], ids=repr)
def test_nothing_to_see_gives_finite_losses_and_gradients(lesson: Lesson) -> None:
    """Maps of 0 have no attention, vectors of 0 no direction."""
    student, target, parts = drawn(lesson)
    nothing = torch.zeros(student.shape, dtype=torch.float64, requires_grad=True)
    tensors = {name: torch.zeros(part.shape, dtype=torch.float64, requires_grad=True) for name, part in parts.items()}
    loss = lesson(nothing, torch.zeros(target.shape, dtype=torch.float64), torch.from_numpy(LABELS), **tensors)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = [tensor.grad for tensor in (nothing, *tensors.values()) if tensor.grad is not None]
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("lesson", [taught(FitNet), taught(Attention), taught(VID), taught(CRD, width=6)], ids=repr)
def test_a_lesson_says_whether_it_looks_at_the_labels(lesson: Lesson) -> None:
    student, target, parts = drawn(lesson)
    given = {name: torch.from_numpy(part) for name, part in parts.items()}
    right, other = (
        lesson(torch.from_numpy(student), torch.from_numpy(target), torch.tensor(labels), **given)
        for labels in (LABELS, [0] * len(LABELS))
    )
    assert lesson.needs_labels != torch.equal(right, other)
