"""The catalogue against the networks that are built, and both against the numbers that the papers print."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from exporters.float32 import fold_batch_norm
from kdedge.models import catalog
from kdedge.models.layers import ReLUMaxPool, convolutions
from kdedge.models.network import (
    BACKBONES,
    Network,
    backbone,
    build,
    build_ensemble,
    count_parameters,
    layers_of,
    merged,
)
from kdedge.models.resnet import Residual
from kdedge.models.view import LowResolution
from kdedge.variants import load_recipes

ROOT = Path(__file__).parent.parent
RESNETS = ["resnet-1-1-0-0", "resnet-2-0-0-0", "resnet-0-2-0-1", "resnet-0-0-0-1-s4", "resnet-3-4-6-3"]
EVERY_MODEL = [*catalog.MODELS, *catalog.FAMILIES.values(), "mlp-1", *RESNETS]


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_catalogue_says_what_is_built(name: str) -> None:
    info = catalog.find(name)
    assert info is not None
    network = backbone(name).eval()
    with torch.no_grad():
        dense = network(torch.zeros(2, *info.image))
    assert (tuple(dense.shape), count_parameters(network)) == ((2, info.dense), info.parameters)


@pytest.mark.parametrize("name", EVERY_MODEL)
def test_catalogue_says_what_layers_give(name: str) -> None:
    info = catalog.find(name)
    assert info is not None
    network = Network([backbone(name)], nn.Linear(info.dense, 10)).eval()
    layers = catalog.layers(name)
    assert layers_of(network.members[0]).keys() == layers.keys()
    with torch.no_grad():
        outputs = network.outputs(images := torch.rand(2, *info.image), [*layers])
        assert torch.equal(outputs.pop("dense"), network.dense(images))
    assert {layer: tuple(maps.shape[1:]) for layer, maps in outputs.items()} == layers


def test_what_a_view_leaves_of_the_image_belongs_to_no_layer() -> None:
    member, images = backbone("tcn-student-8"), torch.rand(2, 1, 28, 28)
    low = Network([nn.Sequential(LowResolution(14), member)], nn.Linear(32, 10)).eval()
    expected = Network([member], nn.Linear(32, 10)).eval().outputs(LowResolution(14)(images), ["conv1", "conv2"])
    found = low.outputs(images, ["conv1", "conv2"])
    assert all(torch.equal(maps, found[name]) for name, maps in expected.items()) and len(found) == 3


def test_a_layer_gives_what_it_gave_when_its_modules_were_through() -> None:
    """Whatever comes after it writes over nothing, though ReLUs work in place."""
    network = build(["vgg-student-1"], 512, 10).eval()
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found = network.outputs(images, ["conv1", "conv2", "conv9"])
        first = network.members[0][:3](images)  # type: ignore[index]  # convolution, batch norm, ReLU
        second = network.members[0][:6](images)  # type: ignore[index]  # and again, with pooling
    assert torch.equal(found["conv1"], first) and torch.equal(found["conv2"], second)


def test_every_model_of_the_catalogue_can_be_built_and_no_other() -> None:
    assert BACKBONES.keys() == catalog.MODELS.keys()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tcn-teacher", 2_380_938),  # Malik et al. 2021, Tables 4 and 6
        ("kd-student", 94_650),
        ("mlp-1200", 2_395_210),  # Hinton et al. 2015
        ("mlp-300", 238_510),  # Khetarpaul et al.
        ("lenet5", 62_006),  # the CIFAR-10 study
        ("vgg16-bn", 14_728_266),  # Teaching assistants over TCN
        ("vgg-student-1", 2_623_146),  # with a head that the paper does not print
        ("vgg13-bn", 28_334_410),  # the CIFAR-10 study's teacher
        ("resnet50", 23_520_842),  # the slides' teacher and students
        ("resnet-2-2-2-2", 11_173_962),
        ("resnet-1-1-1-1", 4_903_242),
        ("resnet-1-1-1-1-s4", 4_903_242),
        ("resnet-1-1-0-0", 307_274),
        ("resnet-2-2-0-0", 676_682),
    ],
)
def test_printed_parameters_with_head(name: str, parameters: int) -> None:
    info = catalog.find(name)
    assert info is not None
    assert count_parameters(build([name], info.dense, 10)) == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("tcn-student-1", 92_080),
        ("tcn-student-2", 46_376),
        ("tcn-student-4", 22_168),
        ("tcn-student-4x", 85_744),
        ("vgg-student-1", 2_618_016),
        ("vgg-student-2", 1_239_968),
        ("vgg-student-4", 600_096),
        ("vgg-student-8", 242_112),
    ],
)
def test_printed_parameters_of_a_student(name: str, parameters: int) -> None:
    assert count_parameters(backbone(name)) == parameters


@pytest.mark.parametrize(
    ("models", "dense", "parameters"),
    [
        (["tcn-student-2"] * 2, 256, 95_322),  # Malik et al. 2021, Table 6: 95.32k
        (["tcn-student-4"] * 4, 256, 91_242),  # 91.24k
        (["tcn-student-4", *["tcn-student-4x"] * 3], 256, 279_400 + 2_570),  # Table 4, "+"
        (["vgg-student-2"] * 2, 512, 2_485_066),
        (["vgg-student-4"] * 4, 512, 2_405_514),
        (["vgg-student-8"] * 8, 512, 1_942_026),
    ],
)
def test_printed_parameters_of_a_group(models: list[str], dense: int, parameters: int) -> None:
    assert count_parameters(build(models, dense, 10)) == parameters


@pytest.mark.parametrize(
    ("name", "with_head", "flops"),
    [
        ("tcn-teacher", True, 26_464_266),
        ("kd-student", True, 11_670_090),
        ("tcn-student-2", False, 6_265_024),
        ("tcn-student-4", False, 3_135_072),
    ],
)
def test_printed_flops(name: str, with_head: bool, flops: int) -> None:
    """Malik et al. 2021, Table 6: two for each multiplication, one for each bias and one for each ReLU."""
    info = catalog.find(name)
    assert info is not None
    network = build([name], info.dense, 10) if with_head else backbone(name)
    assert count_flops(network, torch.zeros(1, *info.image)) == flops


def test_the_record_keeps_within_four_tcn_students() -> None:
    """tcn4_best, counted from its layers by hand, against Malik et al. 2021, Table 6: 91,242 parameters, 12.54 MFLOP."""
    layers = [(28, 1, 8), (14, 8, 16), (14, 16, 16), (7, 16, 32), (7, 32, 32)]  # side of the image, channels in and out
    head = 4 * 32 * 3 * 3
    folded = 4 * sum((9 * inputs + 1) * outputs for _, inputs, outputs in layers) + (head + 1) * 10
    flops = 4 * sum(side**2 * outputs * (2 * 9 * inputs + 2) for side, inputs, outputs in layers) + (2 * head + 1) * 10
    assert (folded, flops) == (81_354, 11_438_090) and folded <= 91_242 and flops <= 12_540_000

    recipe = load_recipes(ROOT / "recipes" / "tcn4_best.yaml")[0]
    network = build(recipe.models("students"), recipe.dense("students"), 10).eval()
    assert count_parameters(fold_batch_norm(network)) == folded
    assert count_flops(network, torch.zeros(1, 1, 28, 28)) == flops


def test_the_students_for_int8_keep_within_four_tcn_students() -> None:
    """tcn4_edge, counted likewise."""
    layers = [(14, 25 * 1, 12), (7, 9 * 12, 24), (4, 9 * 24, 40)]  # side of the map, weights of a filter, filters
    head = 4 * 40 * 4 * 4
    folded = 4 * sum((weights + 1) * filters for _, weights, filters in layers) + (head + 1) * 10
    flops = 4 * sum(side**2 * filters * (2 * weights + 2) for side, weights, filters in layers) + (2 * head + 1) * 10
    assert (folded, flops) == (72_042, 2_676_938)

    recipe = load_recipes(ROOT / "recipes" / "tcn4_edge.yaml")[0]
    network = build(recipe.models("students"), recipe.dense("students"), 10).eval()
    assert count_parameters(fold_batch_norm(network)) == folded
    assert count_flops(network, torch.zeros(1, 1, 28, 28)) == flops


def test_a_layer_that_a_spec_cannot_name_is_refused() -> None:
    with pytest.raises(AssertionError, match="'16x5' is neither M nor a convolution like"):
        convolutions(1, "8 16x5")


def count_flops(network: nn.Module, image: torch.Tensor) -> int:
    biases_and_relus = 0

    def count(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal biases_and_relus
        biases_and_relus += inputs[0].numel() if isinstance(module, ReLUMaxPool) else output.numel()

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.ReLU | ReLUMaxPool):
            module.register_forward_hook(count)
    with FlopCounterMode(display=False) as products, torch.no_grad():
        network(image)
    return int(products.get_total_flops()) + biases_and_relus


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (1, 2, 7, 5)])
def test_pooling_before_relu_changes_nothing(shape: tuple[int, ...]) -> None:
    """Bit for bit and with the same gradient, in both memory formats; the export has the other order."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        drawn = torch.randn(shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
        ours, theirs = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
        found, expected = ReLUMaxPool()(ours), F.max_pool2d(F.relu(theirs), 2)
        assert torch.equal(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize(
    ("name", "sides"),
    [
        ("resnet-1-1-1-1", [16, 8, 4, 2]),  # the max-pool after the first convolution is kept
        ("resnet-1-2-0-0", [16, 8, 8]),  # no blocks, no stage
        ("resnet-1-1-1-1-s2", [8, 4, 2, 1]),
        ("resnet-1-1-1-1-s4", [4, 2, 1, 1]),
        ("resnet-0-1-0-1", [8, 4]),
    ],
)
def test_a_resnet_has_its_blocks_and_no_others(name: str, sides: list[int]) -> None:
    """The side of the image after each block of the slides' networks."""
    network, seen = backbone(name).eval(), []
    for module in network.modules():
        if isinstance(module, Residual):
            module.register_forward_hook(lambda _, __, output: seen.append(output.shape[-1]))
    network(torch.zeros(1, 3, 32, 32))
    assert seen == sides


def test_a_residual_block_adds_its_shortcut() -> None:
    block = Residual(nn.Sequential(nn.Conv2d(1, 1, 1)), nn.Identity())
    images = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    convolution = block.layers[0]
    assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
    expected = torch.relu(images * (1 + convolution.weight.item()) + convolution.bias.item())
    torch.testing.assert_close(block(images), expected)


def test_group_is_its_members_side_by_side_and_one_head() -> None:
    """Malik et al. 2021, Eq. 4 and 5, computed from the members alone."""
    torch.manual_seed(0)
    network = build(["mlp-3", "mlp-5"], 8, 10)
    images = torch.randn(4, 1, 28, 28)
    chunks = [member(images) for member in network.members]
    assert [chunk.shape[1] for chunk in chunks] == [3, 5]
    dense = torch.cat(chunks, 1)
    assert torch.equal(network.dense(images), dense)
    torch.testing.assert_close(network(images), dense @ network.head.weight.T + network.head.bias)


def test_logits_of_an_ensemble_are_the_mean_of_its_members() -> None:
    torch.manual_seed(0)
    network = build_ensemble(["mlp-3", "mlp-5"], [3, 5], 10)
    images = torch.randn(4, 1, 28, 28)
    alone = [head(member(images)) for member, head in zip(network.members, network.heads(), strict=True)]
    torch.testing.assert_close(network(images), (alone[0] + alone[1]) / 2)
    deployed = network.with_one_head()
    assert isinstance(deployed.head, nn.Linear)
    torch.testing.assert_close(deployed(images), (alone[0] + alone[1]) / 2)


def test_a_member_of_an_ensemble_stands_alone() -> None:
    network = build_ensemble(["mlp-3", "mlp-5"], [3, 5], 10)
    images = torch.randn(4, 1, 28, 28)
    second = network.member(1)
    torch.testing.assert_close(second(images), network.heads()[1](network.members[1](images)))
    assert second.models == ["mlp-5"]


def test_the_mean_of_networks_is_that_of_their_logits() -> None:
    """Of a group, an ensemble and a network alone, each with one voice."""
    torch.manual_seed(0)
    networks = [
        build(["mlp-3", "mlp-5"], 8, 10),
        build_ensemble(["mlp-3", "mlp-4"], [3, 4], 10),
        build(["mlp-6"], 6, 10),
    ]
    images = torch.randn(4, 1, 28, 28)
    found = merged(networks, "mean")
    torch.testing.assert_close(found(images), torch.stack([network(images) for network in networks]).mean(0))
    assert found.models == ["mlp-3", "mlp-5", "mlp-3", "mlp-4", "mlp-6"]


def test_the_sum_of_networks_goes_through_the_first_ones_head() -> None:
    torch.manual_seed(0)
    first, second = build(["mlp-3", "mlp-5"], 8, 10), build(["mlp-8"], 8, 10)
    images = torch.randn(4, 1, 28, 28)
    expected = first.head(first.dense(images) + second.dense(images))
    torch.testing.assert_close(merged([first, second], "sum")(images), expected)


def test_a_network_with_one_head_is_left_as_it_is() -> None:
    network = build(["mlp-3", "mlp-5"], 8, 10)
    assert network.with_one_head() is network


def test_students_may_answer_with_negative_numbers_and_the_teacher_may_not() -> None:
    """The FLOP counts of Table 6 leave no room for a ReLU after a student's last layer."""
    images = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    assert backbone("tcn-student-4")(images).min() < 0
    assert backbone("tcn-teacher")(images).min() >= 0


def test_network_keeps_the_names_of_its_weights() -> None:
    """They are in the files of finished stages."""
    network = Network([nn.Linear(2, 3), nn.Linear(2, 3)], nn.Linear(6, 10))
    assert sorted(network.state_dict()) == sorted(
        ["members.0.weight", "members.0.bias", "members.1.weight", "members.1.bias", "head.weight", "head.bias"]
    )


@pytest.mark.parametrize(
    "name",
    [
        *("mlp-0", "mlp-01", "mlp-65537", "mlp-", "mlp-1e3", "tcn-student-3", "", "MLP-300"),
        *(
            "resnet-0-0-0-0",
            "resnet-1-1-1",
            "resnet-1-1-1-1-1",
            "resnet-1-1-1-10",
            "resnet-1-1-1-1-s1",
            "resnet-1-1-1-1-s",
            "resnet18",
        ),
    ],
)
def test_other_names_are_no_models(name: str) -> None:
    assert catalog.find(name) is None


def trained_once(network: Network, images: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Gradients of a loss that every element of the dense vector has its own share in."""
    network.zero_grad()
    dense = network.dense(images)
    (dense * torch.linspace(-1, 1, dense.numel()).view_as(dense)).sum().backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in network.named_parameters()}


def test_members_side_by_side_learn_as_one_after_another() -> None:
    torch.manual_seed(0)
    network = build(["tcn-student-4", "mlp-7", "tcn-student-4"], 64 + 7 + 64, 10)
    images = torch.rand(3, 1, 28, 28)
    threads = torch.get_num_threads()
    with network.side_by_side():
        assert threads == 1 or torch.get_num_threads() == 1  # the members have the cores
        dense, gradients = network.dense(images), trained_once(network, images)
        again = trained_once(network, images)
    assert torch.get_num_threads() == threads
    plain = trained_once(network, images)
    torch.testing.assert_close(dense, network.dense(images))
    for name, gradient in plain.items():
        if name.startswith("head."):
            assert gradient is None and gradients[name] is None  # nobody taught the head
        else:
            torch.testing.assert_close(gradients[name], gradient)
            assert torch.equal(again[name], gradients[name])  # type: ignore[arg-type]


def test_members_side_by_side_compute_in_the_precision_of_who_asks() -> None:
    network, images = build(["tcn-student-4", "mlp-7"], 64 + 7, 10), torch.rand(3, 1, 28, 28)
    with network.side_by_side(), torch.autocast("cpu", torch.bfloat16):
        dense, gradients = network.dense(images), trained_once(network, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense.dtype == torch.bfloat16 and torch.equal(dense, network.dense(images))
        plain = trained_once(network, images)
    for name, gradient in plain.items():
        assert gradient is gradients[name] is None or torch.equal(gradients[name], gradient)  # type: ignore[arg-type]


def test_members_that_learn_nothing_stay_as_they_are_beside_those_that_do() -> None:
    network = build(["mlp-7", "tcn-student-4"], 71, 10)
    network.members[0] = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout(0.5), network.members[0][1])  # type: ignore[index]
    network.members[0].requires_grad_(False)
    network.train()
    assert [member.training for member in network.members] == [False, True] and network.training
    images = torch.rand(3, 1, 28, 28)
    before = {name: value.clone() for name, value in network.members[0].state_dict().items()}
    plain = trained_once(network, images)
    torch.testing.assert_close(dict(network.members[0].state_dict()), before, rtol=0, atol=0)
    network.members[0][2] = nn.Identity()  # type: ignore[operator]  # members with dropout run one after another
    with network.side_by_side():
        together = trained_once(network, images)
    assert plain.keys() == together.keys() and sum(gradient is not None for gradient in plain.values()) == 8
    for name, gradient in plain.items():
        torch.testing.assert_close(together[name], gradient)


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one core has nothing to share")
def test_members_side_by_side_have_threads_of_their_own() -> None:
    network, seen, both = build(["mlp-7"] * 2, 14, 10), [], threading.Barrier(2, timeout=30)

    def meet(*_: object) -> None:
        both.wait()  # one after another, nobody else would come
        seen.append(threading.get_ident())

    for member in network.members:
        member.register_forward_hook(meet)
    with network.side_by_side():
        network.dense(torch.rand(3, 1, 28, 28))
    assert len(set(seen)) == 2 and threading.get_ident() not in seen


def test_threads_are_given_back_after_an_error() -> None:
    network, threads = build(["mlp-7"] * 2, 14, 10), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="shapes"), network.side_by_side():
        network.dense(torch.rand(3, 1, 5, 5))
    assert torch.get_num_threads() == threads
    assert network.dense(torch.rand(3, 1, 28, 28)).shape == (3, 14)


def test_dropout_draws_in_one_order() -> None:
    class Noisy(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Dropout(), nn.Linear(4, 3))

    network = Network([Noisy(), Noisy()], nn.Linear(6, 10))
    with network.side_by_side():
        assert network._threads is None
