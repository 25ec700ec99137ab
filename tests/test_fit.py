"""The training loop against the same training written out by hand, and what happens when it is stopped or goes wrong."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdedge.data.batches import Batch, Samples, Views, batches, normalise, stable_seed
from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError, TrainingError
from kdedge.fit import Learner, Seen, Taught, accuracy, fit, lr_at, not_dropped, objective
from kdedge.learners import member_losses
from kdedge.losses import Lesson
from kdedge.losses.adversarial import Adversarial
from kdedge.losses.dense import MSE
from kdedge.losses.features import Attention
from kdedge.losses.logits import KD, CrossEntropy
from kdedge.models.network import Network, build, build_ensemble
from kdedge.quantize.layers import quantized_network
from kdedge.recipe import Fit
from kdedge.targets import Cached, Live, Targets, Training

SEED = 5
SAMPLES = 200  # 25 steps of 8 an epoch: a checkpoint falls into its middle, after step 20
INFO = DATASETS["fashion-mnist"]

MSE_LESSON = MSE.model_validate({"from": "teacher"})
KD_LESSON = KD.model_validate({"from": "teacher"})
LABELS = [Taught(CrossEntropy())]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written out by hand here is float32, whatever this device multiplies."""
    monkeypatch.setattr("kdedge.fit.multiplies_bf16", lambda device: False)


@pytest.fixture
def in_bf16(monkeypatch: pytest.MonkeyPatch, in_float32: None) -> None:
    """As on a device that multiplies bfloat16; the others can, only slowly."""
    monkeypatch.setattr("kdedge.fit.multiplies_bf16", lambda device: True)


def images(count: int = SAMPLES, seed: int = 0) -> Samples:
    """Images whose label is the brightest of their first ten rows, the only row that is bright."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, count)
    pixels = random.integers(0, 60, (count, 1, 28, 28), np.uint8)
    pixels[np.arange(count), 0, labels] = 200
    return Samples.to(torch.device("cpu"), pixels, labels.astype(np.int64), INFO, Views())


def network(*models: str, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return build(models, sum(int(model.split("-")[1]) for model in models), 10)


def ensemble(members: int) -> Network:
    torch.manual_seed(0)
    return build_ensemble(["mlp-6"] * members, [6] * members, 10)


def copies(trained: Network) -> list[Network]:
    """Each member of an ensemble as a network of its own."""
    return [
        Network([copy.deepcopy(member)], copy.deepcopy(head))
        for member, head in zip(trained.members, trained.heads(), strict=True)
    ]


def with_state() -> Network:
    """A convolution, batch norm with its running mean, and dropout with its random numbers: all that could be lost."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(144, 8))
    return Network([nn.Sequential(*layers)], nn.Linear(8, 10)).to(memory_format=torch.channels_last)


def outputs(width: int, seed: int = 0, views: int = 1) -> Cached:
    """A teacher's outputs, drawn."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(views, SAMPLES, width, generator=generator)
    return Cached({"dense": dense, "logits": torch.randn(views, SAMPLES, 10, generator=generator)})


def train(
    trained: Network,
    taught: list[Taught],
    settings: Fit,
    folder: Path,
    *,
    data: Samples | None = None,
    every_s: float = math.inf,
    watch: Callable[[Seen], None] = lambda seen: None,
    stop: Callable[[], bool] = lambda: False,
    frozen: Targets | None = None,
) -> list[dict[str, float]]:
    (history,) = train_together([Learner(trained, taught, settings, SEED, frozen)], folder, data, every_s, watch, stop)
    return history


def train_together(
    learners: list[Learner],
    folder: Path,
    data: Samples | None = None,
    every_s: float = math.inf,
    watch: Callable[[Seen], None] = lambda seen: None,
    stop: Callable[[], bool] = lambda: False,
) -> list[list[dict[str, float]]]:
    return fit(
        learners,
        data or images(),
        images(50, seed=1),
        checkpoint=folder / "checkpoint",
        checkpoint_every_s=every_s,
        watch=watch,
        stop=stop,
    )


def weights(trained: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in trained.state_dict().items()}


def order(settings: Fit) -> list[Batch]:
    """The batches of all epochs."""
    cpu = torch.device("cpu")
    return [
        batch
        for epoch in range(settings.epochs)
        for batch in batches(SAMPLES, Views(), settings.batch_size, seed=SEED, epoch=epoch, device=cpu)
    ]


# The same training by hand

Step = Callable[[np.ndarray, np.ndarray, dict[str, Any], float, int], np.ndarray]


def adam(value: np.ndarray, gradient: np.ndarray, memory: dict[str, Any], lr: float, t: int) -> np.ndarray:
    """Kingma and Ba 2015, algorithm 1, with the weights' decay of Loshchilov and Hutter 2019, algorithm 2."""
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * gradient
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * gradient**2
    m, v = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
    return value - lr * 0.01 * value - lr * m / (np.sqrt(v) + 1e-8)


def nesterov(value: np.ndarray, gradient: np.ndarray, memory: dict[str, Any], lr: float, t: int) -> np.ndarray:
    """Sutskever et al. 2013 in the form of torch's documentation, the decay being part of the gradient."""
    gradient = gradient + 0.01 * value
    memory["b"] = 0.9 * memory["b"] + gradient if "b" in memory else gradient
    return value - lr * (gradient + 0.9 * memory["b"])


@pytest.mark.parametrize(("optimizer", "step", "lr"), [("adam", adam, 0.01), ("sgd", nesterov, 0.1)])
def test_a_linear_model_is_trained_as_the_papers_say(tmp_path: Path, optimizer: str, step: Step, lr: float) -> None:
    """A head on frozen dense vectors is a linear model: its gradient is (p - onehot) dense, in numpy and float64."""
    settings = Fit.model_validate(
        {"epochs": 3, "batch_size": 32, "optimizer": optimizer, "lr": lr, "weight_decay": 0.01, "warmup": 0.2}
    )
    trained, frozen, labels = network("mlp-6"), outputs(6), images().labels.numpy()
    value = {
        "weight": trained.head.weight.detach().double().numpy(),
        "bias": trained.head.bias.detach().double().numpy(),
    }
    memory: dict[str, dict[str, Any]] = {"weight": {}, "bias": {}}
    losses = []
    steps = 3 * math.ceil(SAMPLES / 32)
    for number, batch in enumerate(order(settings)):
        x, y = frozen.outputs["dense"][0, batch.samples].double().numpy(), labels[batch.samples.numpy()]
        logits = x @ value["weight"].T + value["bias"]
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(len(y)), y]).mean())
        difference = (p - np.eye(10)[y]) / len(y)
        gradient = {"weight": difference.T @ x, "bias": difference.sum(0)}
        lr_now = lr_at(settings, number, steps)
        value = {name: step(value[name], gradient[name], memory[name], lr_now, number + 1) for name in value}

    history = train(trained, LABELS, settings, tmp_path, frozen=frozen)
    np.testing.assert_allclose(trained.head.weight.detach().numpy(), value["weight"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(trained.head.bias.detach().numpy(), value["bias"], rtol=1e-4, atol=1e-5)
    assert [entry["loss"] for entry in history] == pytest.approx(np.reshape(losses, (3, -1)).mean(1), rel=1e-4)


def test_the_loop_is_the_one_that_everybody_writes(tmp_path: Path) -> None:
    """Bit for bit: a plain torch loop on the same batches."""
    settings, data = Fit(epochs=2, batch_size=32), images()
    trained = network("mlp-16")
    plain = copy.deepcopy(trained)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0, fused=True)
    steps = 2 * math.ceil(SAMPLES / 32)
    for number, batch in enumerate(order(settings)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * number / steps))
        loss = F.cross_entropy(plain(normalise(data.images[batch.samples], INFO)), data.labels[batch.samples])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    train(trained, LABELS, settings, tmp_path)
    assert weights(trained) == weights(plain)


def test_in_bf16_weights_losses_and_accuracies_stay_float32(tmp_path: Path, in_bf16: None) -> None:
    """By hand: convolutions and linear layers get bfloat16; the lesson, the optimizer and the validation do not."""
    trained, plain, settings = with_state(), with_state(), Fit(epochs=2, batch_size=32, schedule="constant")
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    trained.head.register_forward_hook(lambda head, given, logits: seen[head.training].add(logits.dtype))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0, fused=True)
    for step, batch in enumerate(order(settings)):
        torch.manual_seed(stable_seed(SEED, "step", step))
        with torch.autocast("cpu", torch.bfloat16):
            logits = plain.train()(normalise(images().images[batch.samples], INFO))
        optimizer.zero_grad()
        F.cross_entropy(logits.float(), images().labels[batch.samples]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    history = train(trained, LABELS, settings, tmp_path)
    assert weights(trained) == weights(plain)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
    assert {tensor.dtype for tensor in trained.parameters()} == {torch.float32}
    assert history[-1]["validation_accuracy"] == accuracy(plain, images(50, seed=1))


def test_it_learns_what_can_be_learned(tmp_path: Path) -> None:
    history = train(network("mlp-16"), LABELS, Fit(epochs=5, batch_size=8, lr=0.01), tmp_path)
    assert history[-1]["validation_accuracy"] == 100
    assert history[-1]["loss"] < 0.1 < 1 < history[0]["loss"]


def test_accuracy_is_the_share_of_right_answers_in_percent() -> None:
    trained, data = network("mlp-16"), images(77)
    logits = trained(normalise(data.images, INFO)).detach().numpy()
    right = sum(int(logits[i].argmax() == data.labels[i]) for i in range(77))
    assert accuracy(trained, data) == 100 * right / 77


def test_batch_norm_learns_in_every_step_and_not_from_the_validation_images(tmp_path: Path) -> None:
    """Measuring accuracy switches to eval mode, and the next epoch has to switch back."""
    trained = with_state()
    train(trained, LABELS, Fit(epochs=3, batch_size=8), tmp_path)
    assert trained.state_dict()["members.0.1.num_batches_tracked"] == 75
    assert not trained.training


def test_each_member_has_a_loss_of_its_own_chunk() -> None:
    """In numpy: the mean squared error of each chunk, times the weights of two lessons."""
    group, teachers, data = (
        network("mlp-6", "mlp-6"),
        [network("mlp-12", seed=1), network("mlp-12", seed=2)],
        images(77),
    )
    lessons = [MSE_LESSON.model_copy(update={"weight": weight}) for weight in (1, 0.25)]
    found = member_losses(group, list(zip(lessons, teachers, strict=True)), data)
    seen = normalise(data.images, INFO)
    ours, first, second = (one.dense(seen).detach().double().numpy() for one in (group, *teachers))
    expected = ((ours - first) ** 2 + 0.25 * (ours - second) ** 2).reshape(77, 2, 6).mean(axis=(0, 2))
    assert found == pytest.approx(expected, rel=1e-5)


# Lessons


def test_siblings_trained_together_are_siblings_trained_alone(tmp_path: Path) -> None:
    """A mean over two chunks is half the mean over one, so the weight of the joint lesson is 2."""
    settings, source = Fit(epochs=2, batch_size=32), outputs(12)
    together = network("mlp-6", "mlp-6")
    alone = [Network([copy.deepcopy(member)], nn.Linear(6, 10)) for member in together.members]
    lesson = MSE.model_validate({"from": "teacher", "weight": 2})
    train(together, [Taught(lesson, source)], settings, tmp_path / "together")
    for number, one in enumerate(alone):
        chunk = Cached({"dense": source.outputs["dense"][:, :, 6 * number : 6 * number + 6].contiguous()})
        train(one, [Taught(MSE_LESSON, chunk)], settings, tmp_path / str(number))
        for name, tensor in one.members[0].state_dict().items():
            torch.testing.assert_close(together.members[number].state_dict()[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_members_of_an_ensemble_are_networks_trained_alone(tmp_path: Path, optimizer: str) -> None:
    """With the learning rate of one, though there are three."""
    settings = Fit.model_validate({"epochs": 2, "batch_size": 32, "optimizer": optimizer, "lr": 0.01})
    together, source = ensemble(3), outputs(6)
    alone = copies(together)
    taught = [Taught(CrossEntropy()), Taught(MSE_LESSON, source), Taught(KD_LESSON, source)]
    train(together, taught, settings, tmp_path / "together")
    for number, one in enumerate(alone):
        train(one, taught, settings, tmp_path / str(number))
        for found, expected in ((together.members[number], one.members[0]), (together.heads()[number], one.head)):
            for name, tensor in expected.state_dict().items():
                torch.testing.assert_close(found.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_peers_teach_the_mean_of_their_softened_outputs_and_learn_nothing_from_it() -> None:
    """Loss and gradient of three members, each on a target of two constants (Zhang et al. 2018)."""
    trained, data = ensemble(3), images()
    alone = copies(trained)
    batch = Batch(torch.tensor([3, 1, 4, 15, 92]), torch.zeros(5, dtype=torch.int64))
    lesson = KD.model_validate({"from": "peers", "temperature": 2, "alpha": 1, "weight": 0.5})
    loss = objective(trained, [Taught(lesson)], data, batch)
    loss.backward()  # type: ignore[no-untyped-call]

    seen = normalise(data.images[batch.samples], INFO)
    softened = [(one(seen).detach() / 2).softmax(1) for one in alone]
    total = torch.zeros(())
    for number, one in enumerate(alone):
        target = torch.stack(softened[:number] + softened[number + 1 :]).mean(0)
        total = total + 0.5 * 4 * F.cross_entropy(one(seen) / 2, target)
    total.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, total)
    for number, one in enumerate(alone):
        for name, parameter in one.members[0].named_parameters():
            torch.testing.assert_close(trained.members[number].get_parameter(name).grad, parameter.grad)
        torch.testing.assert_close(trained.heads()[number].weight.grad, one.heads()[0].weight.grad)


def test_of_a_lesson_with_drop_each_step_leaves_other_sources_out() -> None:
    """In their order, evenly, and the same ones for the same seed; of the other lessons none."""
    lesson = KD.model_validate({"from": ["a", "b", "c"], "drop": 1}).share()
    sources = [outputs(6, seed) for seed in range(3)]
    taught = [Taught(CrossEntropy()), *(Taught(lesson, source) for source in sources), Taught(KD_LESSON, sources[0])]
    place = {id(one): number for number, one in enumerate(taught)}
    left = [[place[id(one)] for one in not_dropped(taught, seed % 300)] for seed in range(600)]
    assert left[:300] == left[300:]
    counts = [left.count([0, *pair, 4]) for pair in ([1, 2], [1, 3], [2, 3])]
    assert sum(counts) == 600 and all(140 < count < 260 for count in counts)


def test_every_step_drops_anew_and_a_resumed_training_drops_the_same(tmp_path: Path) -> None:
    """Three teachers of one class each: which of them are heard is in the losses, step by step."""
    lesson = MSE.model_validate({"from": ["a", "b", "c"], "drop": 2}).share()
    constant = [Cached({"dense": torch.full((1, SAMPLES, 6), 100.0 * n)}) for n in range(3)]
    taught, settings = [Taught(lesson, source) for source in constant], Fit(epochs=2, batch_size=8)
    whole, resumed = network("mlp-6"), network("mlp-6")
    heard: list[float] = []
    train(whole, taught, settings, tmp_path, watch=lambda seen: heard.append(seen.loss), stop=lambda: False)
    assert 3000 < heard[-1] < 30_000  # of 0, 10,000 and 40,000 in turn
    for _ in range(2):
        asked = itertools.count(1)
        with pytest.raises(KeyboardInterrupt):
            train(resumed, taught, settings, tmp_path, stop=lambda asked=asked: next(asked) > 6)  # type: ignore[misc]
        resumed = network("mlp-6")
    train(resumed, taught, settings, tmp_path)
    assert weights(resumed) == weights(whole)


def test_without_a_lesson_on_logits_the_head_stays(tmp_path: Path) -> None:
    """Not even weight decay may touch it."""
    trained = network("mlp-6")
    before = weights(trained)
    train(trained, [Taught(MSE_LESSON, outputs(6))], Fit(epochs=1, weight_decay=0.1), tmp_path)
    after = weights(trained)
    assert {name for name in before if before[name] == after[name]} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("kind", ["cached", "live"])
def test_with_frozen_members_only_the_head_changes(tmp_path: Path, kind: str) -> None:
    """The members' batch norm would move if they were not in eval mode."""
    trained = with_state().eval()
    before = weights(trained)
    frozen = Live(trained) if kind == "live" else outputs(8)
    train(trained, LABELS, Fit(epochs=2, batch_size=32, weight_decay=0.1), tmp_path, frozen=frozen)
    after = weights(trained)
    assert {name for name in before if before[name] != after[name]} == {"head.weight", "head.bias"}


def test_a_head_that_learns_in_bf16_gets_what_frozen_members_give_in_float32(tmp_path: Path, in_bf16: None) -> None:
    """So does the file of the head, whose members are files of their own."""
    trained, given = with_state().eval(), set[torch.dtype]()
    trained.head.register_forward_pre_hook(lambda head, values: given.add(values[0].dtype))
    train(trained, LABELS, Fit(epochs=1, batch_size=32), tmp_path, frozen=Live(copy.deepcopy(trained)))
    assert given == {torch.float32}


def test_a_quantized_network_learns_in_float32_everywhere(tmp_path: Path, in_bf16: None) -> None:
    """A layer takes the very values that lie on the grid of its file's integers."""
    trained, given = quantized_network(network("mlp-16"), 8, 60), set[torch.dtype]()
    for layer in trained.modules():
        layer.register_forward_hook(lambda layer, values, outputs: given.add(outputs.dtype))
    history = train(trained, LABELS, Fit(epochs=5, batch_size=8, lr=0.01), tmp_path)
    assert given == {torch.float32} and history[-1]["loss"] < 0.2


def test_frozen_members_see_the_validation_images_once(tmp_path: Path) -> None:
    """In every epoch they would give the same, which takes longer than a head learns."""
    trained, data = with_state(), images(50, seed=1)
    calls: list[int] = []
    trained.members[0].register_forward_hook(lambda member, given, dense: calls.append(len(given[0])))
    history = train(trained, LABELS, Fit(epochs=3, batch_size=32), tmp_path, frozen=outputs(8))
    assert calls == [len(data)]
    assert history[-1]["validation_accuracy"] == accuracy(trained, data)


def test_the_objective_is_the_weighted_sum_of_the_lessons() -> None:
    trained, data, source = network("mlp-6", "mlp-6"), images(), outputs(12)
    batch = Batch(torch.tensor([3, 1, 4, 15, 92]), torch.zeros(5, dtype=torch.int64))
    lessons = [
        lesson.model_copy(update={"weight": w})
        for lesson, w in ((CrossEntropy(), 0.5), (MSE_LESSON, 3), (KD_LESSON, 0.25))
    ]
    taught = [Taught(lessons[0]), Taught(lessons[1], source), Taught(lessons[2], source)]
    found = objective(trained, taught, data, batch)

    seen = normalise(data.images[batch.samples], INFO)
    labels, teacher = data.labels[batch.samples], source(batch, None)
    expected = 0.5 * F.cross_entropy(trained(seen), labels) + 3 * F.mse_loss(trained.dense(seen), teacher["dense"])
    expected += 0.25 * KD_LESSON(trained(seen), teacher["logits"], labels)
    torch.testing.assert_close(found, expected)


def test_a_lesson_on_maps_compares_the_layers_that_it_names() -> None:
    """The student's first layer with the teacher's first, beside a lesson on dense vectors of the same live teacher."""
    torch.manual_seed(0)
    student, teacher = (build(["tcn-student-8"], 32, 10) for _ in range(2))
    lesson = Attention.model_validate({"from": "teacher", "layer": "conv1", "from_layer": "conv1", "weight": 3})
    batch, data = Batch(torch.arange(5), torch.zeros(5, dtype=torch.int64)), images()
    source = Live(teacher.eval(), ("conv1",))
    found = objective(student, [Taught(lesson, source), Taught(MSE_LESSON, source)], data, batch)
    found.backward()  # type: ignore[no-untyped-call]

    seen = normalise(data.images[batch.samples], INFO)
    ours, theirs = (network.members[0][:2](seen) for network in (student, teacher))  # type: ignore[index]
    expected = 3 * lesson(ours, theirs, data.labels[:5]) + F.mse_loss(student.dense(seen), teacher.dense(seen))
    torch.testing.assert_close(found, expected)
    assert student.members[0].get_parameter("0.weight").grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_live_teacher_answers_once_a_batch_for_all_lessons_and_siblings() -> None:
    teacher = network("mlp-12").eval()
    calls: list[Tensor] = []
    teacher.members[0].register_forward_hook(lambda module, inputs, output: calls.append(output))
    source = Live(teacher)
    batch = Batch(torch.arange(9), torch.zeros(9, dtype=torch.int64))
    taught = [Taught(MSE_LESSON, source), Taught(KD_LESSON, source)]
    loss = objective(network("mlp-6", "mlp-6"), taught, images(), batch)
    loss.backward()  # type: ignore[no-untyped-call]
    assert len(calls) == 1
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_live_and_cached_teachers_teach_the_same(tmp_path: Path) -> None:
    teacher, data = network("mlp-12", seed=3).eval(), images()
    seen = normalise(data.images, INFO)
    with torch.no_grad():
        cached = Cached({"dense": teacher.dense(seen)[None], "logits": teacher(seen)[None]})
    found = []
    for name, source in (("live", Live(teacher)), ("cached", cached)):
        student = network("mlp-6", "mlp-6")
        taught = [Taught(MSE_LESSON, source), Taught(KD_LESSON, source)]
        train(student, taught, Fit(epochs=1, batch_size=32), tmp_path / name)
        found.append(student.state_dict())
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-3, atol=1e-5)


# A network that learns from one that is still training

HALF = KD.model_validate({"from": "teacher", "temperature": 1, "alpha": 0.5})


def pair(
    teacher: Network, student: Network, settings: Fit, student_settings: Fit | None = None, lesson: Lesson = HALF
) -> list[Learner]:
    """A teacher, and a student that takes the same steps; its seed is another one."""
    shown = Training()
    return [
        Learner(teacher, LABELS, settings, SEED, shown=shown),
        Learner(student, [Taught(lesson, shown)], student_settings or settings, SEED + 1),
    ]


def linear() -> Network:
    return Network([nn.Flatten()], nn.Linear(784, 10))


def test_an_apprentice_learns_what_its_teacher_knows_by_then(tmp_path: Path) -> None:
    """Scheme A of Mishra and Marr 2018 in numpy and float64, on linear networks, by plain gradient descent: of the loss
    H(y, p_T) + 0.5 H(y, p_A) + 0.5 H(z_T, p_A), where the last term does not reach the teacher."""
    torch.manual_seed(0)
    settings = Fit.model_validate({"epochs": 2, "batch_size": 32, "optimizer": "sgd", "momentum": 0.0, "lr": 0.02})
    slower, data, labels = settings.model_copy(update={"lr": 0.005, "warmup": 0.5}), images(), images().labels.numpy()
    networks = [linear(), linear()]
    w, b = (
        [part.detach().double().numpy() for part in parts]
        for parts in zip(*(one.head.parameters() for one in networks), strict=True)
    )
    losses = []
    for number, batch in enumerate(order(settings)):
        x = normalise(data.images[batch.samples], INFO).flatten(1).double().numpy()
        y = np.eye(10)[labels[batch.samples.numpy()]]
        p, q = (np.exp(z) / np.exp(z).sum(1, keepdims=True) for z in (x @ w[n].T + b[n] for n in (0, 1)))
        losses.append([-(target * np.log(given)).sum(1).mean() for target, given in ((y, p), ((y + p) / 2, q))])
        for n, (pace, error) in enumerate(((settings, p - y), (slower, 0.5 * (q - y) + 0.5 * (q - p)))):
            lr = lr_at(pace, number, 14)
            w[n] = w[n] - lr * error.T @ x / len(x)
            b[n] = b[n] - lr * error.mean(0)
    histories = train_together(pair(*networks, settings, slower), tmp_path)
    for n, trained in enumerate(networks):
        np.testing.assert_allclose(trained.head.weight.detach().numpy(), w[n], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(trained.head.bias.detach().numpy(), b[n], rtol=1e-4, atol=1e-5)
        expected = np.reshape(losses, (2, 7, 2)).mean(1)[:, n]
        assert [entry["loss"] for entry in histories[n]] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_teacher_ends_as_it_would_alone_whoever_trains_with_it(tmp_path: Path, optimizer: str) -> None:
    """Bit for bit, with dropout in both: no gradient and no random number of the student comes to it."""
    settings = Fit.model_validate({"epochs": 2, "batch_size": 8, "optimizer": optimizer, "weight_decay": 0.01})
    alone, together, student = with_state(), with_state(), with_state()
    before = weights(student)
    expected = train(alone, LABELS, settings, tmp_path)
    other = settings.model_copy(update={"lr": 0.01, "weight_decay": 0.0, "schedule": "constant"})
    history, _ = train_together(pair(together, student, settings, other), tmp_path)
    assert weights(together) == weights(alone) and weights(student) not in (before, weights(alone))
    assert [{**entry, "seconds": 0} for entry in history] == [{**entry, "seconds": 0} for entry in expected]


def test_siblings_that_teach_while_they_train_end_as_they_would_alone(tmp_path: Path) -> None:
    """On several threads too: they train side by side in both cases."""
    settings, alone, together = Fit(epochs=1, batch_size=8), network("mlp-6", "mlp-6"), network("mlp-6", "mlp-6")
    train(alone, LABELS, settings, tmp_path)
    train_together(pair(together, network("mlp-12", seed=1), settings, lesson=MSE_LESSON), tmp_path)
    assert weights(together) == weights(alone)


def test_a_student_learns_maps_of_a_network_that_trains_with_it(tmp_path: Path) -> None:
    """And what an ensemble gives is the mean of its logits."""
    torch.manual_seed(0)
    student, teacher = (build(["tcn-student-8"], 32, 10) for _ in range(2))
    batch, data = Batch(torch.arange(5), torch.zeros(5, dtype=torch.int64)), images()
    seen, shown = normalise(data.images[batch.samples], INFO), Training({"conv1"})
    objective(teacher.eval(), LABELS, data, batch, shown=shown)
    lesson = Attention.model_validate({"from": "teacher", "layer": "conv1", "from_layer": "conv1"})
    found = objective(student, [Taught(lesson, shown), Taught(MSE_LESSON, shown)], data, batch)
    found.backward()  # type: ignore[no-untyped-call]
    expected = objective(
        student, [Taught(lesson, Live(teacher, ("conv1",))), Taught(MSE_LESSON, Live(teacher))], data, batch
    )
    torch.testing.assert_close(found, expected)
    assert all(parameter.grad is None for parameter in teacher.parameters())

    several, shown = ensemble(3), Training()
    objective(several, LABELS, data, batch, shown=shown)
    torch.testing.assert_close(shown(batch, None), {"dense": several.dense(seen), "logits": several(seen)})


# Lessons that learn themselves


def adversarial(members: int, width: int, **fields: Any) -> Taught:
    """A lesson with parts, and its source."""
    lesson = Adversarial.model_validate({"from": "teacher", "layers": [8, 8], **fields})
    generator = torch.Generator().manual_seed(0)
    shapes = lesson.parts(members, (width,), (width,)).items()
    parts = nn.ParameterDict({name: 0.3 * torch.randn(part.shape, generator=generator) for name, part in shapes})
    return Taught(lesson, outputs(width), parts)


def test_a_network_and_the_parts_of_its_lessons_learn_in_the_same_step(tmp_path: Path) -> None:
    """Bit for bit: a plain loop in which the parts have an optimizer of their own, with half the learning rate."""
    settings, data = Fit(epochs=1, batch_size=32, schedule="constant"), images()
    trained, taught = network("mlp-12"), adversarial(2, 12, discriminator_lr=0.5)
    plain, parts, source = copy.deepcopy(trained), copy.deepcopy(taught.parts), outputs(12)
    ours = torch.optim.AdamW(plain.members.parameters(), lr=1e-3, weight_decay=0, fused=True)
    theirs = torch.optim.AdamW(parts.parameters(), lr=5e-4, weight_decay=0, fused=True)
    for batch in order(settings):
        student = plain.dense(normalise(data.images[batch.samples], INFO))
        loss = taught.lesson(student, source(batch, None)["dense"], data.labels[batch.samples], **parts)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        loss.backward()
        for optimizer in (ours, theirs):
            optimizer.step()
    train(trained, [taught], settings, tmp_path)
    assert weights(trained) == weights(plain)
    assert weights(taught.parts) == weights(parts)


# The learning rate


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Fit(lr=0.1), [0.1, 0.1 * (2 + math.sqrt(2)) / 4, 0.05, 0.1 * (2 - math.sqrt(2)) / 4]),
        (Fit(lr=0.1, schedule="constant"), [0.1, 0.1, 0.1, 0.1]),
        (Fit(lr=0.3, warmup=0.5), [0.1, 0.2, 0.3, 0.15]),
        (Fit(lr=0.3, warmup=0.5, schedule="constant"), [0.1, 0.2, 0.3, 0.3]),
    ],
)
def test_learning_rate_of_four_steps(settings: Fit, expected: list[float]) -> None:
    assert [lr_at(settings, step, 4) for step in range(4)] == pytest.approx(expected)


# Stopping and going on


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("every_steps", [20, 25, 30])  # in an epoch, at its end, and now and then in both
def test_a_resumed_training_ends_in_the_same_bytes(tmp_path: Path, optimizer: str, every_steps: int) -> None:
    settings = Fit.model_validate({"epochs": 3, "batch_size": 8, "optimizer": optimizer, "lr": 0.01})
    whole, taught = with_state(), [Taught(CrossEntropy()), Taught(MSE_LESSON, outputs(8)), adversarial(2, 8)]
    expected = train(whole, taught, settings, tmp_path)
    assert not (tmp_path / "checkpoint").exists()

    for starts in itertools.count(1):
        resumed, anew, steps = with_state(), [*taught[:2], adversarial(2, 8)], []

        def stop(steps: list[int] = steps) -> bool:
            return bool(steps) and steps[-1] >= steps[0] // every_steps * every_steps + every_steps

        try:
            history = train(
                *(resumed, anew, settings, tmp_path),
                watch=lambda seen, steps=steps: steps.append(seen.step),  # type: ignore[misc]
                stop=stop,
            )
            break
        except KeyboardInterrupt:
            assert (tmp_path / "checkpoint").is_file()
    assert starts > 2
    assert weights(resumed) == weights(whole) and weights(anew[2].parts) == weights(taught[2].parts)
    for found, entry in zip(history, expected, strict=True):
        assert {**found, "seconds": 0} == {**entry, "seconds": 0}


def test_a_resumed_training_in_bf16_ends_in_the_same_bytes(tmp_path: Path, in_bf16: None) -> None:
    settings, whole, resumed, asked = Fit(epochs=2, batch_size=8), with_state(), with_state(), itertools.count(1)
    train(whole, LABELS, settings, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(with_state(), LABELS, settings, tmp_path, stop=lambda: next(asked) > 30)
    train(resumed, LABELS, settings, tmp_path)
    assert weights(resumed) == weights(whole)


def test_a_resumed_ensemble_of_peers_ends_in_the_same_bytes(tmp_path: Path) -> None:
    """Each member's own head is in the checkpoint as well."""
    taught = [Taught(CrossEntropy()), Taught(KD.model_validate({"from": "peers", "temperature": 1}))]
    settings, whole, resumed, asked = Fit(epochs=2, batch_size=8), ensemble(3), ensemble(3), itertools.count(1)
    train(whole, taught, settings, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(ensemble(3), taught, settings, tmp_path, stop=lambda: next(asked) > 30)
    train(resumed, taught, settings, tmp_path)
    assert weights(resumed) == weights(whole)


def test_the_time_before_a_stop_counts(tmp_path: Path) -> None:
    settings, asked = Fit(epochs=1, batch_size=8), itertools.count(1)

    def slow(seen: Seen) -> None:
        time.sleep(0.2 if seen.step == 20 else 0)

    with pytest.raises(KeyboardInterrupt):
        train(network("mlp-4"), LABELS, settings, tmp_path, watch=slow, stop=lambda: next(asked) == 22)
    (epoch,) = train(network("mlp-4"), LABELS, settings, tmp_path)
    assert epoch["seconds"] > 0.2


def rounding() -> Network:
    """A convolution, batch norm and a linear layer that round; the range of what they take is set in the first 30 steps."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 5, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8))
    return quantized_network(Network([nn.Sequential(*layers)], nn.Linear(8, 10)), 8, 30)


def ranges(trained: nn.Module) -> dict[str, bytes]:
    return {name: value for name, value in weights(trained).items() if name.endswith((".low", ".high"))}


@pytest.mark.parametrize("steps", [20, 40])
def test_a_resumed_quantized_training_ends_in_the_same_bytes(tmp_path: Path, steps: int) -> None:
    """Killed while ranges are observed, or when they stay already."""
    settings, whole, killed, resumed = Fit(epochs=2, batch_size=8, lr=0.01), rounding(), rounding(), rounding()
    seen: list[Seen] = []
    train(whole, LABELS, settings, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(killed, LABELS, settings, tmp_path, watch=seen.append, stop=lambda: bool(seen) and seen[-1].step >= steps)
    train(resumed, LABELS, settings, tmp_path)
    assert weights(resumed) == weights(whole)
    assert (ranges(killed) == ranges(whole)) == (steps > 30)
    assert len(ranges(whole)) == 4 and len(set(ranges(whole).values())) == 4


@pytest.mark.parametrize("steps", [20, 25, 40])  # while ranges are observed, at the end of an epoch, when they stay
def test_a_resumed_pair_of_which_one_is_quantized_ends_in_the_same_bytes(tmp_path: Path, steps: int) -> None:
    settings, seen = Fit(epochs=2, batch_size=8, lr=0.01), list[Seen]()
    whole, killed, resumed = (pair(with_state(), rounding(), settings) for _ in range(3))
    expected = train_together(whole, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_together(killed, tmp_path, watch=seen.append, stop=lambda: bool(seen) and seen[-1].step >= steps)
    found = train_together(resumed, tmp_path)
    for one, other in zip(resumed, whole, strict=True):
        assert weights(one.network) == weights(other.network)
    assert (ranges(killed[1].network) == ranges(whole[1].network)) == (steps > 30)
    told, hoped = ([[{**epoch, "seconds": 0} for epoch in one] for one in histories] for histories in (found, expected))
    assert told == hoped and told[0] != told[1]


def test_a_head_learns_the_range_of_what_frozen_members_give(tmp_path: Path) -> None:
    """Theirs stay as they are."""
    trained = rounding()
    train(trained, LABELS, Fit(epochs=1, batch_size=8), tmp_path, frozen=outputs(8))
    steps = {name: int(value) for name, value in trained.state_dict().items() if name.endswith(".steps")}
    assert steps == {"members.0.4.given.steps": 0, "head.given.steps": 25}
    found = trained.get_buffer("head.given.low"), trained.get_buffer("head.given.high")
    seen = [outputs(8)(batch, None)["dense"] for batch in order(Fit(epochs=1, batch_size=8))]
    expected = (
        torch.stack([batch.min() for batch in seen]).mean(),
        torch.stack([batch.max() for batch in seen]).mean(),
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("calls", range(1, 12))
def test_a_stop_between_any_two_steps_saves_what_was_done(tmp_path: Path, calls: int) -> None:
    settings, asked = Fit(epochs=2, batch_size=8), itertools.count(1)
    seen: list[Seen] = []
    with pytest.raises(KeyboardInterrupt):
        train(network("mlp-4"), LABELS, settings, tmp_path, watch=seen.append, stop=lambda: next(asked) >= calls)
    assert (tmp_path / "checkpoint").is_file()
    done = seen[-1].step
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        train(network("mlp-4"), LABELS, settings, tmp_path, watch=seen.append, stop=lambda: True)
    assert seen[-1].step == done + 1


def test_checkpoints_are_written_on_a_clock(tmp_path: Path) -> None:
    """With 0 seconds between them: at every look at the losses, and at the end of each epoch but the last."""
    written: list[bool] = []
    file = tmp_path / "checkpoint"

    def watch(seen: Seen) -> None:
        written.append(file.exists())
        file.unlink(missing_ok=True)

    train(network("mlp-4"), LABELS, Fit(epochs=2, batch_size=8), tmp_path, every_s=0, watch=watch)
    # Looks: after steps 20, 25 and the accuracy, 45, 50 and the accuracy.
    assert written == [False, True, False, True, True, False]
    assert not file.exists()


def test_what_is_shown_while_training(tmp_path: Path) -> None:
    seen: list[Seen] = []
    history = train(network("mlp-4", "mlp-4"), LABELS, Fit(epochs=2, batch_size=8), tmp_path, watch=seen.append)
    assert [(look.epoch, look.step) for look in seen] == [(1, 20), (1, 25), (1, 25), (2, 45), (2, 50), (2, 50)]
    assert {(look.epochs, look.steps) for look in seen} == {(2, 50)}
    accuracies = [look.validation_accuracy for look in seen]
    assert accuracies == [None, None, history[0]["validation_accuracy"], None, None, history[1]["validation_accuracy"]]
    assert [seen[2].loss, seen[5].loss] == [entry["loss"] for entry in history]
    assert all(look.images_per_s > 0 for look in seen)


# What goes wrong


def test_a_loss_that_is_no_number_stops_with_step_and_learning_rate(tmp_path: Path) -> None:
    with pytest.raises(TrainingError) as error:
        train(network("mlp-4"), LABELS, Fit(epochs=2, batch_size=8, lr=1e30, schedule="constant"), tmp_path)
    said = str(error.value)
    assert "at step 2 of 50 (epoch 1), learning rate 1e+30. No checkpoint was made yet. Try a lower `lr`" in said
    assert said.startswith(("The loss became nan", "The loss became inf"))


def test_a_loss_that_is_no_number_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The checkpoint of step 20 stays as it was; the teacher's outputs turn bad in the second epoch."""
    source, looks = outputs(4), []

    def watch(seen: Seen) -> None:
        looks.append(seen.step)
        if seen.step == 25:
            source.outputs["dense"].fill_(math.nan)

    with pytest.raises(TrainingError) as error:
        train(
            *(network("mlp-4"), [Taught(MSE_LESSON, source)], Fit(epochs=2, batch_size=8, lr=0.01), tmp_path),
            every_s=0,
            watch=watch,
        )
    assert "became nan at step 26 of 50 (epoch 2), learning rate 0.005." in str(error.value)
    assert f"The last good checkpoint is {tmp_path / 'checkpoint'}." in str(error.value)
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert saved["step"] == 25
    assert all(tensor.isfinite().all() for tensor in saved["weights"].values())


@pytest.mark.parametrize("which", [0, 1])
def test_of_a_pair_the_one_that_went_wrong_tells_its_learning_rate(tmp_path: Path, which: int) -> None:
    rates = [1e30 if number == which else 1e-3 for number in range(2)]
    settings = [Fit(epochs=2, batch_size=8, lr=lr, schedule="constant") for lr in rates]
    with pytest.raises(TrainingError, match=r"became (nan|inf) at step 2 of 50 \(epoch 1\), learning rate 1e\+30\."):
        train_together(pair(network("mlp-4"), network("mlp-4", seed=1), *settings, lesson=LABELS[0].lesson), tmp_path)


def test_weights_that_are_no_numbers_are_never_finished(tmp_path: Path) -> None:
    """The only loss is that of the first weights, a good number; the step after it is what ruins them."""
    settings = Fit.model_validate({"epochs": 1, "batch_size": SAMPLES, "optimizer": "sgd", "lr": 1e39, "warmup": 0})
    with pytest.raises(TrainingError, match=r"A weight became infinite or nan at step 1 of 1 \(epoch 1\)"):
        train(network("mlp-4"), LABELS, settings, tmp_path)


def test_parts_of_lessons_that_are_no_numbers_are_never_kept(tmp_path: Path) -> None:
    """Else the last good checkpoint would be a bad one. The network's own rate is harmless."""
    settings = Fit.model_validate({"epochs": 1, "batch_size": 8, "optimizer": "sgd", "lr": 1e-6, "warmup": 0})
    with pytest.raises(TrainingError, match=r"A weight became infinite or nan at step 1 of 25"):
        train(
            *(network("mlp-12"), [adversarial(2, 12, discriminator_lr=1e45)], settings, tmp_path),
            every_s=0,
            stop=lambda: True,
        )
    assert not (tmp_path / "checkpoint").exists()


def checkpoint(folder: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        train(network("mlp-4"), LABELS, Fit(epochs=1, batch_size=8), folder, stop=lambda: True)
    return folder / "checkpoint"


def damaged(whole: bytes) -> dict[str, bytes]:
    saved = io.BytesIO()
    torch.save([1, 2], saved)
    return {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "text": b"not a checkpoint",
        "zeros": bytes(len(whole)),
        "other": pickle.dumps({"step": 1}, protocol=2),
        "list": saved.getvalue(),
    }


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "zeros", "other", "list"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    file = checkpoint(tmp_path)
    file.write_bytes(damaged(file.read_bytes())[damage])
    with pytest.raises(RunError, match=r"checkpoint is damaged .*Delete it to start this stage again"):
        train(network("mlp-4"), LABELS, Fit(epochs=1, batch_size=8), tmp_path)


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path)
    with pytest.raises(RunError, match="checkpoint is damaged"):
        train(network("mlp-5"), LABELS, Fit(epochs=1, batch_size=8), tmp_path)


class _Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    torch.save({"weights": _Hostile(tmp_path / "hacked")}, tmp_path / "checkpoint")
    with pytest.raises(RunError, match="checkpoint is damaged"):
        train(network("mlp-4"), LABELS, Fit(epochs=1, batch_size=8), tmp_path)
    assert not (tmp_path / "hacked").exists()
