"""Rewritings for the device: the same logits for any group, from fewer layers and never from more numbers."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from random_networks import answers, data_of, group, images, network, pixels_of
from tiny_export import float_nodes
from torch import Tensor, nn

from exporters.calibration import ranges
from exporters.float32 import from_pixels, to_graph
from exporters.int8 import quantize
from kdedge.data.batches import normalise
from kdedge.models.network import Network, count_parameters, merged
from kdedge.models.rewriting import for_float32, for_int8, rewritten
from kdedge.models.view import Centre, LowResolution

EXACT = 1e-5  # of the range of the logits
TCN, VGG = data_of("tcn-student-4"), data_of("vgg-student-4")


def logits(module: nn.Module, given: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = module(given)
    return found


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=EXACT * float(expected.max() - expected.min()))


def before_convolution(number: int) -> Callable[[Sequence[nn.Module]], int]:
    """Siblings share what stands before this one of their convolutions, or all where there is none."""

    def shared_layers(layers: Sequence[nn.Module]) -> int:
        found = [n for n, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
        return found[number] if number < len(found) else len(layers)

    return shared_layers


@pytest.mark.parametrize("seed", range(150))
def test_any_group_gives_the_same_logits_from_no_more_numbers_and_is_left_as_it_was(seed: int) -> None:
    plain = group(seed)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    given = torch.randn(7, 1, 12, 12, generator=torch.Generator().manual_seed(seed))
    expected = logits(plain, given)
    for shared_layers in (len, for_float32, for_int8, *map(before_convolution, range(4))):
        found = rewritten(plain, given[:2], shared_layers)
        assert_same(logits(found, given), expected)
        assert count_parameters(found) <= count_parameters(plain)
        assert len(found.members) <= len(plain.members)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert_same(logits(plain, given), expected)


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_networks_made_of_others_give_the_same_logits(how: str) -> None:
    """`mean`: what an ensemble is deployed as; `sum`: a student and the assistant that learned the rest (minus)."""
    plain = merged([network("tcn-student-1", seed=seed) for seed in range(2)], how)  # type: ignore[arg-type]
    given = normalise(images(5, TCN), TCN)
    found = rewritten(plain, given[:2], len)
    assert len(found.members) == 1
    assert_same(logits(found, given), logits(plain, given))


def test_siblings_of_one_model_become_one_chain_beside_those_of_another() -> None:
    plain = network("tcn-student-4", "tcn-student-2", "tcn-student-4", "tcn-student-2", "tcn-teacher")
    given = normalise(images(5, TCN), TCN)
    found = rewritten(plain, given[:2], len)
    assert [type(members[0]).__name__ for members in found.members] == ["Conv2d"] * 3  # type: ignore[index]
    assert [members[0].out_channels for members in found.members] == [2 * 32, 2 * 64, 32]  # type: ignore[index]
    assert_same(logits(found, given), logits(plain, given))


def test_siblings_that_see_the_image_otherwise_are_not_joined() -> None:
    low, lower, middle = LowResolution(14), LowResolution(7), Centre(14)
    for views, joined in (([low, low], 1), ([low, lower], 2), ([low, middle], 2)):
        plain = network("tcn-student-4", "tcn-student-4")
        plain.members = nn.ModuleList(map(nn.Sequential, views, plain.members))
        given = normalise(images(5, TCN), TCN)
        found = rewritten(plain, given[:2], len)
        assert len(found.members) == joined
        assert_same(logits(found, given), logits(plain, given))


class Centred(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class Squared(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


@pytest.mark.parametrize("layer", [Centred(), nn.Conv2d(4, 4, 1, groups=2), nn.Softmax2d()], ids=repr)
def test_siblings_with_a_layer_that_may_mix_them_stay_apart(layer: nn.Module) -> None:
    parts = [nn.Sequential(nn.Conv2d(1, 4, 3), layer, nn.Flatten(), nn.Linear(400, 16)) for _ in range(2)]
    plain = Network(parts, nn.Linear(32, 3)).eval()
    given = torch.randn(5, 1, 12, 12)
    found = rewritten(plain, given[:2], len)
    assert len(found.members) == 2
    assert_same(logits(found, given), logits(plain, given))


@pytest.mark.parametrize(("width", "folded"), [(64, True), (2, False)])
def test_a_last_linear_layer_goes_into_the_head_where_that_is_smaller(width: int, folded: bool) -> None:
    plain = Network([nn.Sequential(nn.Flatten(), nn.Linear(144, width))], nn.Linear(width, 10)).eval()
    given = torch.randn(5, 1, 12, 12)
    found = rewritten(plain, given[:2], len)
    assert count_parameters(found) == (144 * 10 + 10 if folded else 145 * width + (width + 1) * 10)
    assert_same(logits(found, given), logits(plain, given))


def test_a_last_layer_that_is_more_than_linear_stays() -> None:
    plain = Network([nn.Sequential(nn.Flatten(), Squared(144, 64)) for _ in range(2)], nn.Linear(128, 10)).eval()
    given = torch.randn(5, 1, 12, 12)
    found = rewritten(plain, given[:2], len)
    assert count_parameters(found) == count_parameters(plain)
    assert_same(logits(found, given), logits(plain, given))


def test_a_layer_before_a_relu_stays() -> None:
    teacher = network("tcn-teacher")
    assert count_parameters(rewritten(teacher, normalise(images(2, TCN), TCN), len)) == count_parameters(teacher)


def operators(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.node if node.op_type not in ("QuantizeLinear", "Reshape"))


@pytest.mark.parametrize(
    ("models", "shared_layers", "expected"),
    [
        (["tcn-student-4"] * 4, for_int8, {"Conv": 3, "Relu": 3, "MaxPool": 1, "Gemm": 1}),
        (
            ["tcn-student-4"] * 4,  # eight filters each do not fill a block of float32
            for_float32,
            {"Conv": 8, "Relu": 12, "MaxPool": 4, "Gemm": 5, "Concat": 1},
        ),
        (["vgg-student-4"] * 4, for_float32, {"Conv": 8, "Relu": 8, "MaxPool": 5, "AveragePool": 1, "Gemm": 1}),
        (
            ["compact-4"] * 3,
            for_int8,
            {"Conv": 1 + 3 * 4, "Relu": 1 + 3 * 4, "MaxPool": 1 + 3 * 2, "Split": 1, "Concat": 1, "Gemm": 1},
        ),
    ],
    ids=["tcn", "tcn in float", "vgg", "compact"],
)
def test_the_graph_holds_what_is_left_and_computes_what_the_plain_one_does(
    models: list[str], shared_layers: Callable[[Sequence[nn.Module]], int], expected: dict[str, int]
) -> None:
    plain, info = network(*models), data_of(models[0])
    given = images(9, info)
    graph = to_graph(
        rewritten(plain, normalise(given[:2], info), shared_layers), normalise(given[:2], info), "x", "logits"
    )
    assert operators(graph) == expected
    content = from_pixels(graph, pixels_of(info), info.shape).SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    found = np.concatenate([session.run(None, {"image": part.numpy()})[0] for part in given.split([1, 3, 5])])
    assert_same(torch.from_numpy(found), answers(plain, given, info))


def test_the_int8_graph_takes_pixels_into_one_convolution_and_is_fused_whole(tmp_path: Path) -> None:
    plain = network(*["tcn-student-4"] * 4)
    given = images(100, TCN)
    inputs = normalise(given, TCN)
    graph = to_graph(rewritten(plain, inputs[:2], for_int8), inputs[:2], "pixels", "logits")
    quantized = quantize(graph, ranges(graph, inputs.numpy()), pixels_of(TCN), TCN.shape)
    (first,) = (node for node in quantized.graph.node if "image" in node.input)
    assert [node.op_type for node in quantized.graph.node if first.output[0] in node.input] == ["Conv"]
    onnx.save(quantized, tmp_path / "int8.onnx")
    assert float_nodes(tmp_path / "int8.onnx") == []
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {"image": given.numpy()})[0]
    assert np.corrcoef(found.ravel(), answers(plain, given, TCN).numpy().ravel())[0, 1] > 0.98
