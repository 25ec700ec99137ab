"""Images made from a network alone: what is asked of it, that they come to answer it, and that a kill changes nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets.folder import pil_loader

from kdedge.data.batches import normalise, stable_seed
from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError
from kdedge.impressions import (
    Synthesis,
    class_similarity,
    divergence,
    read_impressions,
    synthesize,
    wanted_outputs,
    write_impressions,
)
from kdedge.models.network import Network, build
from kdedge.recipe_images import Impressions
from kdedge.store import write_json

INFO = DATASETS["fashion-mnist"]
SEED = 3


def settings(**fields: object) -> Impressions:
    small = {"from": "teacher", "count": 30, "steps": 40, "batch_size": 10, "lr": 0.1, "temperature": 8}
    return Impressions.model_validate(small | fields)


def network() -> Network:
    """Its logits differ enough to answer with any class."""
    torch.manual_seed(0)
    made = build(["mlp-16"], 16, 10)
    with torch.no_grad():
        made.head.weight *= 20  # type: ignore[operator]
    return made


def made(folder: Path, stop_after: int | None = None, every_s: float = math.inf, **fields: object) -> Synthesis:
    """What is synthesized; stopped at that question whether to stop."""
    asked = iter(range(100_000))
    return synthesize(
        network(),
        INFO,
        settings(**fields),
        seed=SEED,
        checkpoint=folder / "checkpoint",
        checkpoint_every_s=every_s,
        watch=lambda *seen: None,
        stop=lambda: stop_after is not None and next(asked) == stop_after,
    )


# What is asked for


def test_similarity_is_the_cosine_stretched_from_0_to_1_in_each_row() -> None:
    weights = np.random.default_rng(0).normal(size=(5, 7))
    expected = np.empty((5, 5))
    for i in range(5):
        row = [
            weights[i] @ weights[j] / math.sqrt(weights[i] @ weights[i] * (weights[j] @ weights[j])) for j in range(5)
        ]
        expected[i] = [(value - min(row)) / (max(row) - min(row)) for value in row]
    np.testing.assert_allclose(class_similarity(weights), expected, atol=1e-12)


def test_similarity_of_three_classes_by_hand() -> None:
    """45 degrees between the first two, a right angle and 135 degrees to the third: cosines 1, 0.7071, 0 and -0.7071."""
    found = class_similarity(np.array([[1.0, 0.0], [3.0, 3.0], [0.0, -2.0]]))
    half = math.sqrt(0.5)
    second = (half + half) / (1 + half)
    np.testing.assert_allclose(found, [[1, half, 0], [second, 1, 0], [half / (1 + half), 0, 1]], atol=1e-12)


def test_outputs_have_the_moments_of_their_dirichlet_distributions() -> None:
    """Mean a_i/a_0 and variance a_i (a_0 - a_i) / (a_0^2 (a_0 + 1)), for every class and beta, within 5 standard errors."""
    similarity = np.array([[1.0, 0.4, 0.0], [0.4, 1.0, 0.2], [0.0, 0.3, 1.0]])
    found = wanted_outputs(similarity, settings(count=60_000, betas=[2.0, 0.1]), seed=0).astype(np.float64)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    for kind in range(3):
        for position, beta in enumerate((2.0, 0.1)):
            drawn = found[3 * position + kind :: 6]
            a = beta * similarity[kind]
            mean = a / a.sum()
            variance = mean * (1 - mean) / (a.sum() + 1)
            assert len(drawn) == 10_000
            assert (abs(drawn.mean(0) - mean) <= 5 * np.sqrt(variance / 10_000) + 1e-7).all()
            np.testing.assert_allclose(drawn.var(0), variance, atol=0.01)
            assert (drawn[:, a == 0] == 0).all()


def test_the_smallest_beta_still_gives_distributions() -> None:
    similarity = np.array([[1.0, 0.0], [0.0, 1.0]])
    found = wanted_outputs(similarity, settings(count=200_000, betas=[0.05]), seed=0)
    assert np.isfinite(found).all() and found.shape == (200_000, 2)


def test_outputs_are_drawn_by_the_seed() -> None:
    first, again, other = (wanted_outputs(np.eye(10) + 0.1, settings(), seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.dtype == np.float32


def test_divergence_is_its_formula() -> None:
    """KL(wanted || softmax(z / T)), where 0 log 0 is 0; and 0 where the network answers what is wanted."""
    pixels = torch.randint(0, 256, (6, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    logits = network()(normalise(pixels, INFO)).detach().double().numpy() / 20
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = np.random.default_rng(0).dirichlet(np.ones(10), 6)
    wanted[0] = np.eye(10)[4]
    expected = [
        sum(y * math.log(y / q) for y, q in zip(*row, strict=True) if y > 0) for row in zip(wanted, p, strict=True)
    ]
    found = divergence(network(), pixels, torch.from_numpy(wanted).float(), INFO, 20.0)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4)
    assert found[0].item() == pytest.approx(-math.log(p[0, 4]), rel=1e-4)
    nothing = divergence(network(), pixels, torch.from_numpy(p).float(), INFO, 20.0)
    assert nothing.abs().max() < 1e-5


# What is made


def test_images_come_to_answer_what_is_wanted(tmp_path: Path) -> None:
    found = made(tmp_path)
    assert found.images.shape == (30, 1, 28, 28) and found.images.dtype == np.uint8
    assert found.divergence < 0.1 * found.divergence_noise
    weights = network().head.weight.detach().double().numpy()  # type: ignore[union-attr,operator]
    wanted = wanted_outputs(class_similarity(weights), settings(), stable_seed(SEED, "outputs"))
    answers = (
        (network()(normalise(torch.from_numpy(found.images), INFO)) / settings().temperature)
        .softmax(1)
        .detach()
        .numpy()
    )
    assert np.abs(answers - wanted).max() < 0.25 and np.abs(answers - wanted).mean() < 0.02


def test_steps_lower_the_divergence(tmp_path: Path) -> None:
    by_steps = [made(tmp_path, steps=steps).divergence for steps in (1, 5, 20)]
    assert by_steps == sorted(by_steps, reverse=True)


def test_a_stopped_synthesis_goes_on_and_ends_in_the_same_images(tmp_path: Path) -> None:
    whole = made(tmp_path / "whole")
    for question in (0, 39, 40, 95):  # of 40 steps for each of three batches
        folder = tmp_path / str(question)
        with pytest.raises(KeyboardInterrupt):
            made(folder, stop_after=question)
        assert (folder / "checkpoint").is_file()
        again = made(folder)
        assert np.array_equal(again.images, whole.images)
        assert (again.divergence_noise, again.divergence) == (whole.divergence_noise, whole.divergence)
        assert again.seconds > spent_s(folder)


def spent_s(folder: Path) -> float:
    """The time that a checkpoint remembers."""
    with np.load(folder / "checkpoint") as content:
        remembered = float(content["spent_s"])
    assert remembered > 0
    return remembered


def test_a_killed_synthesis_repeats_no_batch_of_its_checkpoint(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    steps = 0

    def count() -> bool:
        nonlocal steps
        steps += 1
        if steps == 90:
            raise Killed
        return False

    def go_on() -> Synthesis:
        return synthesize(
            network(), INFO, settings(), seed=SEED, checkpoint=tmp_path / "checkpoint", checkpoint_every_s=0,
            watch=lambda *seen: None, stop=count,
        )  # fmt: skip

    with pytest.raises(Killed):
        go_on()
    assert np.array_equal(go_on().images, made(tmp_path / "whole").images)
    assert steps == 90 + 40


def test_a_damaged_checkpoint_is_told(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(RunError, match=r"checkpoint is damaged: .*Delete it and distil again"):
        made(tmp_path)


# On disk


def test_images_are_written_whole_with_a_picture_of_them(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (120, 3, 8, 8), np.uint8)
    write_json(tmp_path / "stage.json", write_impressions(tmp_path, images))
    assert np.array_equal(read_impressions(tmp_path), images)
    picture = np.asarray(pil_loader(tmp_path / "images.png")).transpose(2, 0, 1)
    assert picture.shape == (3, 102, 102)  # ten of 8 pixels in a row, 2 between them
    assert np.array_equal(picture[:, 2:10, 12:20], images[1])  # the second class, in the second column
    assert np.array_equal(picture[:, 12:20, 2:10], images[10])


def test_images_that_were_changed_are_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "stage.json", write_impressions(tmp_path, np.zeros((4, 1, 8, 8), np.uint8)))
    (tmp_path / "images.npz").write_bytes((tmp_path / "images.npz").read_bytes()[:-1])
    for _ in range(2):
        with pytest.raises(
            RunError, match=r"images\.npz is missing or was changed\. Delete its folder and distil again"
        ):
            read_impressions(tmp_path)
        (tmp_path / "images.npz").unlink(missing_ok=True)
