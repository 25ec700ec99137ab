"""Networks that round: where they do, that batch norm can be folded after it, and what is left when it is taken away."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from random_networks import data_of, images, network, pixels_of
from torch import Tensor, nn

from exporters.float32 import fold_batch_norm, to_graph
from exporters.int8 import quantize_trained
from exporters.parity import check_trained
from kdedge.data.batches import normalise
from kdedge.data.load import load
from kdedge.distillation import distill
from kdedge.losses import LOSSES, OF_LAYERS
from kdedge.models.layers import GlobalMean
from kdedge.models.network import Network, layers_of
from kdedge.models.resnet import Residual
from kdedge.models.view import Centre, LowResolution
from kdedge.networks import finished_network, new_network
from kdedge.quantize.fake import ActivationQuantizer
from kdedge.quantize.layers import (
    QuantizedConv2d,
    QuantizedLinear,
    in_float,
    quantized_backbone,
    quantized_network,
    rounded,
    weight_limits,
    with_rounded_biases,
)
from kdedge.recipe_reader import parse_recipe
from kdedge.store import read_document

FAMILIES = ["tcn-student-4", "mlp-30", "lenet5", "compact-4", "vgg-student-8", "resnet-1-1-0-0"]


def trained(*models: str, steps: int = 2, bits: int = 8) -> tuple[Network, Tensor]:
    """A network that rounds and has seen some images, in eval mode, and these images, normalised."""
    info = data_of(models[0])
    made, seen = quantized_network(network(*models), bits, steps), normalise(images(32, info), info)
    made.train()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # keeps its statistics
    for _ in range(steps):
        made(seen)
    return made.eval(), seen


@pytest.mark.parametrize("model", FAMILIES)
def test_every_layer_that_computes_takes_what_is_rounded_but_for_pixels(model: str) -> None:
    """Seen from inside: 256 levels, or pixels."""
    made, seen = trained(model)
    taken: list[tuple[nn.Module, Tensor]] = []
    inner = (QuantizedConv2d, QuantizedLinear)
    for module in made.modules():
        if isinstance(module, inner):
            module.given.register_forward_hook(lambda given, values, gave: taken.append((given, gave)))
        elif isinstance(module, GlobalMean):
            module.register_forward_hook(lambda module, values, gave: taken.append((module, *values)))
    made(seen)
    convolutions = [module for module in made.modules() if isinstance(module, inner)]
    assert len(taken) == len(convolutions) + sum(isinstance(module, GlobalMean) for module in made.modules())
    for _, values in taken:
        assert len(values.unique()) <= 256


def test_each_term_of_a_residual_sum_is_rounded() -> None:
    made, seen = trained("resnet-1-1-0-0")
    terms: list[Tensor] = []
    blocks = [module for module in made.modules() if isinstance(module, Residual)]
    for block in blocks:
        for branch in (block.layers, block.shortcut):
            branch.register_forward_hook(lambda branch, given, gave: terms.append(gave))
    made(seen)
    assert len(terms) == 2 * len(blocks) == 4
    assert all(len(term.unique()) <= 256 for term in terms)


def test_pixels_are_not_rounded_again_unless_they_are_means() -> None:
    info = data_of("tcn-student-4")
    for view, count in ((Centre(12), 3), (LowResolution(7), 4)):
        member = nn.Sequential(view, network("tcn-student-4").members[0])
        found = [part for part in quantized_backbone(member, 8, 1).modules() if isinstance(part, ActivationQuantizer)]
        assert len(found) == count, info  # of four layers


@pytest.mark.parametrize("model", FAMILIES)
def test_without_its_rounding_a_network_is_what_it_was(model: str) -> None:
    made, seen = trained(model)
    assert torch.equal(in_float(made)(seen), network(model)(seen))
    assert not torch.equal(made(seen), network(model)(seen))


@pytest.mark.parametrize(("bits", "limit"), [(8, 64), (4, 7), (2, 1)])
def test_the_first_layer_of_each_member_and_the_head_keep_eight_bits(bits: int, limit: int) -> None:
    made, _ = trained("tcn-student-4", "tcn-student-4", bits=bits)
    weights = dict(rounded(made).named_parameters())
    limits = weight_limits(made)
    assert list(limits.values()) == [64, limit, limit, limit] * 2 + [64]
    assert weight_limits(made.head) == {"weight": 64}
    for name, steps in limits.items():
        rows = weights[name].detach().flatten(1)
        integers = rows / rows.abs().amax(1, keepdim=True) * steps
        torch.testing.assert_close(integers, integers.round(), rtol=0, atol=1e-4)


def test_the_first_layer_is_the_one_that_takes_the_image_in_a_residual_network_too() -> None:
    made, _ = trained("resnet-1-1-0-0", bits=2)
    limits = weight_limits(made)
    assert [name for name, limit in limits.items() if limit == 64] == [next(iter(limits)), "head.weight"]
    assert len(limits) == 7  # conv1, two blocks of two and a shortcut, the head


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("model", FAMILIES)
def test_rounding_weights_and_then_folding_batch_norm_is_rounding_in_training(model: str, bits: int) -> None:
    """A batch norm multiplies a channel's grid as it multiplies its weights."""
    made, seen = trained(model, bits=bits)
    folded = fold_batch_norm(rounded(made))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    expected, found = made(seen).detach(), folded(seen).detach()
    step = float(expected.abs().max()) / 50  # where a sum falls between two levels, float32 may give either
    torch.testing.assert_close(found, expected, rtol=0, atol=step)
    agreeing = (found - expected).abs() < 1e-4 * expected.abs().max()
    assert agreeing.float().mean() > 0.5


def test_integers_of_a_channel_are_the_same_before_and_after_folding() -> None:
    made, _ = trained("compact-4")
    plain, folded = (
        [module.weight for module in one.modules() if isinstance(module, nn.Conv2d)]
        for one in (rounded(made), fold_batch_norm(rounded(made)))
    )
    for before, after in zip(plain, folded, strict=True):
        integers = [
            weight.flatten(1) / weight.flatten(1).abs().amax(1, keepdim=True) * 64 for weight in (before, after)
        ]
        torch.testing.assert_close(integers[0].abs().round(), integers[1].abs().round())
        torch.testing.assert_close(integers[1], integers[1].round(), rtol=0, atol=1e-3)
        assert not torch.equal(before, after)


def test_the_weights_of_a_network_stay_its_own_and_layers_keep_their_names() -> None:
    plain = network("resnet-1-1-0-0")
    weights = dict(plain.named_parameters())
    names = list(layers_of(plain.members[0]))
    made = quantized_network(plain, 8, 1)
    assert {id(weight) for weight in made.parameters()} == {id(weight) for weight in weights.values()}
    assert list(layers_of(made.members[0])) == names


def test_every_weight_has_a_gradient_through_the_rounding() -> None:
    made, seen = trained("tcn-student-4")
    made.train()
    made(seen).square().mean().backward()  # type: ignore[no-untyped-call]
    for name, parameter in made.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


# Each lesson teaches what rounds

TAUGHT = """
name: labels
data: {name: fashion-mnist, validation: 100, calibration: 20, limit: 64}
networks:
  teacher: {model: edge-4, fit: {epochs: 2, batch_size: 16, lr: 0.01}}
  student: {model: edge-4, fit: {epochs: 2, batch_size: 16, lr: 0.01}, quantize: {observe_steps: 4}}
"""


def student(runs: Path, data_dir: Path, *overrides: str) -> tuple[dict[str, Tensor], Network]:
    """The weights with which a student that rounds starts, and the student after eight steps of finite losses."""
    recipe = parse_recipe(TAUGHT, overrides=overrides)
    run = distill(recipe, runs=runs, device="cpu", data_dir=data_dir)
    losses = [epoch["loss"] for epoch in read_document(run.stage("fit student") / "stage.json")["history"]]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    start = quantized_network(new_network(recipe, "student"), 8, 4)
    return start.state_dict(), finished_network(run, recipe, "student", "fit student")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, so that their teacher is trained once."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def by_labels(runs: Path, data_dir: Path) -> dict[str, Tensor]:
    """What the student's weights become without another lesson."""
    return student(runs, data_dir)[1].state_dict()


@pytest.mark.parametrize("loss", sorted(LOSSES.keys() - {"cross_entropy"}))
def test_each_lesson_moves_every_layer_and_the_file_computes_what_was_learned(
    loss: str, by_labels: dict[str, Tensor], runs: Path, data_dir: Path, tmp_path: Path
) -> None:
    layers = ", layer: conv2, from_layer: conv2" if loss in OF_LAYERS else ""
    lesson = f"{{from: teacher, loss: {loss}{layers}, weight: 100}}"  # the values of some are that small
    lessons = f"networks.student.learns=[{{loss: cross_entropy}}, {lesson}]"
    start, trained = student(runs, data_dir, f"name={loss}", lessons)
    learned = trained.state_dict()
    assert all(value.isfinite().all() for value in learned.values())
    for name in weight_limits(trained):
        for other in (start, by_labels):
            assert (learned[name] - other[name]).abs().max() > 0.005, name

    given = torch.from_numpy(load("fashion-mnist", data_dir).test_images)
    info = data_of("edge-4")
    seen, pixels = normalise(given, info), pixels_of(info)
    graph = to_graph(rounded(trained), seen[:2], "pixels", "logits")
    onnx.save(quantize_trained(graph, weight_limits(trained), pixels, info.shape), tmp_path / "int8.onnx")
    simulated = with_rounded_biases(fold_batch_norm(rounded(trained)), pixels.scale)
    difference, _ = check_trained(tmp_path / "int8.onnx", simulated, given.numpy(), seen, of_classes=True)
    assert difference < 0.01 * np.ptp(trained(seen).detach().numpy())
