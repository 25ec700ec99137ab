"""The adversarial lesson against its two terms written out in numpy, and each term's gradient against differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bad_recipes import network
from numpy.typing import NDArray
from torch import Tensor

from kdedge.losses.adversarial import Adversarial

Array = NDArray[np.float64]

MEMBERS, CHUNK, BATCH = 3, 4, 5
LAYERS = [6, 7, 5]


def taught(reading: str, **fields: Any) -> Adversarial:
    return Adversarial.model_validate({"from": "teacher", "layers": LAYERS, "reading": reading, **fields})


def drawn(lesson: Adversarial) -> tuple[Array, Array, dict[str, Array]]:
    """Student's and teacher's dense vectors, and discriminators whose batch norm is not the identity."""
    random = np.random.default_rng(0)
    width = MEMBERS * CHUNK
    weights = {
        name: random.normal(0, 0.5, part.shape) for name, part in lesson.parts(MEMBERS, (width,), (width,)).items()
    }
    return random.normal(0, 1, (BATCH, width)), random.normal(0, 1, (BATCH, width)), weights


def call(lesson: Adversarial, student: Tensor, target: Array, weights: dict[str, Tensor]) -> Tensor:
    return lesson(student, torch.from_numpy(target), torch.zeros(len(target), dtype=torch.int64), **weights)


def discriminator(x: Array, weights: dict[str, Array], member: int) -> tuple[Array, Array]:
    """Of one member: the probability of being real, [batch], and the reconstruction, [batch, CHUNK]."""
    for n in range(len(LAYERS)):
        x = x @ weights[f"weight{n}"][member].T + weights[f"bias{n}"][member].T
        x = np.where(x > 0, x, 0.2 * x)
        if n > 0:
            x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
            x = x * (1 + weights[f"gain{n}"][member].T) + weights[f"shift{n}"][member].T
    logit, rec = (
        x @ weights[f"{name}_weight"][member].T + weights[f"{name}_bias"][member].T for name in ("real", "rec")
    )
    return 1 / (1 + np.exp(-logit[:, 0])), rec


def members_of(vectors: Array) -> list[Array]:
    return [vectors[:, CHUNK * m : CHUNK * m + CHUNK] for m in range(MEMBERS)]


def student_term(reading: str, student: Array, target: Array, weights: dict[str, Array]) -> float:
    """Mean over the members of BCE(D(s), 1) + MSE(s or rec(D(s)), d)."""
    terms = []
    for m, (s, d) in enumerate(zip(members_of(student), members_of(target), strict=True)):
        p, rec = discriminator(s, weights, m)
        compared = s if reading == "paper" else rec
        terms.append(np.mean(-np.log(p)) + np.mean((compared - d) ** 2))
    return float(np.mean(terms))


def discriminator_term(student: Array, target: Array, weights: dict[str, Array]) -> float:
    """Mean over the members of BCE(D(d), 1) + MSE(rec(D(d)), d) + BCE(D(s), 0) + MSE(rec(D(s)), d)."""
    terms = []
    for m, (s, d) in enumerate(zip(members_of(student), members_of(target), strict=True)):
        (p_real, rec_real), (p_fake, rec_fake) = discriminator(d, weights, m), discriminator(s, weights, m)
        real = np.mean(-np.log(p_real)) + np.mean((rec_real - d) ** 2)
        terms.append(real + np.mean(-np.log(1 - p_fake)) + np.mean((rec_fake - d) ** 2))
    return float(np.mean(terms))


def slope(function: Callable[[], float], values: Array) -> Array:
    """Central differences of `function` by each of `values`, which are changed and put back."""
    found = np.zeros_like(values)
    for place in np.ndindex(values.shape):
        kept, sides = values[place], []
        for step in (1e-6, -1e-6):
            values[place] = kept + step
            sides.append(function())
        values[place] = kept
        found[place] = (sides[0] - sides[1]) / 2e-6
    return found


@pytest.mark.parametrize("reading", ["paper", "code"])
def test_the_loss_is_the_sum_of_both_terms(reading: str) -> None:
    lesson = taught(reading)
    student, target, weights = drawn(lesson)
    found = call(lesson, torch.from_numpy(student), target, {name: torch.from_numpy(w) for name, w in weights.items()})
    expected = student_term(reading, student, target, weights) + discriminator_term(student, target, weights)
    assert float(found) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("reading", ["paper", "code"])
def test_the_student_learns_from_its_own_term_and_the_discriminators_from_theirs(reading: str) -> None:
    """The gradient check: differences of one term each, although there is one loss and one backward pass."""
    lesson = taught(reading)
    student, target, weights = drawn(lesson)
    ours = torch.from_numpy(student.copy()).requires_grad_()
    parts = {name: torch.from_numpy(w.copy()).requires_grad_() for name, w in weights.items()}
    call(lesson, ours, target, parts).backward()
    expected = slope(lambda: student_term(reading, student, target, weights), student)
    assert ours.grad is not None
    np.testing.assert_allclose(ours.grad.numpy(), expected, rtol=1e-4, atol=1e-7)
    for name, part in parts.items():
        expected = slope(lambda: discriminator_term(student, target, weights), weights[name])
        assert part.grad is not None
        np.testing.assert_allclose(part.grad.numpy(), expected, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("reading", "error"), [("paper", 5), ("code", 2)])
def test_by_hand_where_the_discriminator_knows_nothing(reading: str, error: float) -> None:
    """With weights of 0 its probabilities are 1/2 and its reconstruction is 0; s = (3, 1) and d = (0, 2)."""
    lesson = taught(reading)
    weights = {name: torch.zeros(part.shape) for name, part in lesson.parts(1, (2,), (2,)).items()}
    found = call(lesson, torch.tensor([[3.0, 1.0]]), np.array([[0.0, 2.0]], np.float32), weights)
    # MSE(s, d) is (9 + 1) / 2 = 5, MSE(0, d) is 4 / 2 = 2; the discriminator has the latter twice.
    assert float(found) == pytest.approx(3 * math.log(2) + error + 2 * 2, rel=1e-6)


def test_sure_discriminators_give_finite_losses_and_gradients() -> None:
    lesson = taught("code")
    student, target, weights = drawn(lesson)
    ours = torch.from_numpy(student).requires_grad_()
    loss = call(lesson, ours, target, {name: torch.from_numpy(1e4 * w) for name, w in weights.items()})
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.isfinite() and ours.grad is not None and ours.grad.isfinite().all()


@pytest.mark.parametrize(
    ("chunk", "layers", "values"),
    [(64, (64, 128, 256, 512, 1024), 776_705), (256, (64, 128, 256, 512, 1024), 985_793)],
)
def test_it_has_the_size_of_the_authors(chunk: int, layers: tuple[int, ...], values: int) -> None:
    """Their summaries count running means and variances too, two for each unit with batch norm; ours has none."""
    parts = taught("paper", layers=layers).parts(4, (4 * chunk,), (4 * chunk,))
    running = 2 * sum(layers[1:])
    assert sum(math.prod(part.shape) for part in parts.values()) == 4 * (values - running)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("layers: [64, 0]", "layers[1]: expected a number of at least 1, got 0"),
        ("layers: [64, 70000]", "layers[1]: expected a number of at most 65,536, got 70000"),
        ("layers: [6.5]", "layers[0]: expected a whole number, got 6.5"),
        ("layers: 64", "layers: expected a value such as [64, 128], got 64"),
        ("layers: []", "layers: empty; write for example `layers: [64, 128]`"),
        ("reading: text", "reading: unknown reading 'text'. Readings: paper, code"),
        ("discriminator_lr: 0", "discriminator_lr: expected a number above 0, got 0"),
    ],
)
def test_what_is_wrong_with_a_lesson(field: str, message: str) -> None:
    lesson = f"{{from: t, loss: adversarial, {field}}}"
    students = f"{{model: tcn-student-4, count: 4, learns: [{lesson}], head: {{from: t}}}}"
    assert network(students) == f"bad.yaml:5: networks.x.learns[0].{message}"
