"""Static quantization: what is in the graph, that it is near the float32 one, and that onnxruntime fuses it whole."""

import platform
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from random_networks import answers, data_of, images, network, pixels_of
from tiny_export import float_nodes
from torch import nn

from exporters.calibration import activations, ranges
from exporters.float32 import ExportError, fold_batch_norm, from_pixels, to_graph
from exporters.int8 import FORMS, quantize, quantize_trained
from exporters.signals import layers
from kdedge.data.batches import normalise
from kdedge.devices.runner import cpu_class
from kdedge.models.network import Network
from kdedge.models.view import Centre, LowResolution
from kdedge.quantize.layers import quantized_network, rounded, weight_limits, with_rounded_biases

TCN = data_of("tcn-student-4")
CALIBRATION = normalise(images(128, TCN), TCN)


@pytest.fixture(scope="module")
def students() -> Network:
    return network("tcn-student-4", "tcn-student-4")


@pytest.fixture(scope="module")
def float32(students: Network) -> onnx.ModelProto:
    return to_graph(students, CALIBRATION[:2], "pixels", "logits")


@pytest.fixture(scope="module")
def merged(float32: onnx.ModelProto) -> onnx.ModelProto:
    return quantize(float32, ranges(float32, CALIBRATION.numpy()), pixels_of(TCN), TCN.shape)


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {value.name: numpy_helper.to_array(value) for value in model.graph.initializer}


def run(model: onnx.ModelProto, given: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: given})[0])


def test_pixels_go_into_the_first_convolution_as_they_are(merged: onnx.ModelProto) -> None:
    assert [value.name for value in merged.graph.input] == ["image"]
    image = merged.graph.input[0].type.tensor_type
    assert image.elem_type == onnx.TensorProto.UINT8
    assert [axis.dim_param or axis.dim_value for axis in image.shape.dim] == ["batch", 1, 28, 28]
    (first,) = (node for node in merged.graph.node if "image" in node.input)
    assert first.op_type == "DequantizeLinear"
    scale, zero_point = (constants(merged)[name] for name in first.input[1:])
    assert (zero_point.dtype.name, int(zero_point)) == ("uint8", TCN.mean)
    assert (scale.dtype.name, float(scale)) == ("float32", pixels_of(TCN).scale)
    takers = [node.op_type for node in merged.graph.node if first.output[0] in node.input]
    assert takers == ["Conv", "Conv"]  # of the two members


def test_logits_leave_as_float32_of_the_last_layer_itself(merged: onnx.ModelProto) -> None:
    (logits,) = merged.graph.output
    assert (logits.name, logits.type.tensor_type.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    (last,) = (node for node in merged.graph.node if "logits" in node.output)
    assert last.op_type == "Gemm"


def test_weights_stay_in_the_seven_bits_that_every_cpu_adds_without_saturating(merged: onnx.ModelProto) -> None:
    weights = [value for value in constants(merged).values() if value.dtype == np.int8 and value.ndim > 1]
    assert len(weights) == 2 * 4 + 1  # two convolutions and two linear layers a member, and the head
    assert all(value.min() >= -64 and value.max() <= 64 for value in weights)
    assert all(np.abs(value).max() == 64 for value in weights)


def test_every_layer_has_one_weight_scale_a_channel(merged: onnx.ModelProto) -> None:
    known = constants(merged)
    scales = [
        known[node.input[1]] for node in merged.graph.node if node.input[0] in known and known[node.input[0]].ndim > 1
    ]
    assert sorted(scale.size for scale in scales) == sorted([32, 8, 16, 64] * 2 + [10])


def test_what_follows_a_relu_has_zero_point_zero(float32: onnx.ModelProto, merged: onnx.ModelProto) -> None:
    after_relu = {name for node in float32.graph.node if node.op_type == "Relu" for name in node.output}
    quantizing = [n for n in merged.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in after_relu]
    assert len(quantizing) == len(after_relu) == 2 * 3
    assert {int(constants(merged)[node.input[2]]) for node in quantizing} == {0}
    assert "Relu" not in {node.op_type for node in merged.graph.node}  # the range of the layer before it says the same


def test_int8_logits_are_near_those_of_torch(students: Network, merged: onnx.ModelProto) -> None:
    given = images(200, TCN, seed=5)
    expected = answers(students, given, TCN).numpy()
    for batch in (1, 3, 5):
        found = run(merged, given[:batch].numpy())
        assert found.shape == (batch, 10)
    found = run(merged, given.numpy())
    difference = float(np.abs(found - expected).max())
    assert 0 < difference < 0.1 * np.ptp(expected)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99


def test_a_student_and_a_group_are_fused_whole(merged: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(merged, tmp_path / "merged.onnx")
    assert float_nodes(tmp_path / "merged.onnx") == []


@pytest.mark.parametrize(
    ("model", "first", "in_float"),
    [
        ("mlp-30", "Reshape", []),
        ("lenet5", "Conv", []),
        ("vgg-student-8", "Conv", []),
        ("resnet-1-1-0-0", "Conv", []),
    ],
)
def test_other_families_are_fused_as_well(model: str, first: str, in_float: list[str], tmp_path: Path) -> None:
    info, module = data_of(model), network(model)
    given = images(100, info)
    samples = normalise(given, info)
    graph = to_graph(module, samples[:2], "pixels", "logits")
    quantized = quantize(graph, ranges(graph, samples.numpy()), pixels_of(info), info.shape)
    (taken,) = (node for node in quantized.graph.node if "image" in node.input)
    assert [node.op_type for node in quantized.graph.node if taken.output[0] in node.input] == [first]
    expected = answers(module, given, info).numpy()
    assert np.corrcoef(run(quantized, given.numpy()).ravel(), expected.ravel())[0, 1] > 0.98
    onnx.save(quantized, tmp_path / "int8.onnx")
    assert float_nodes(tmp_path / "int8.onnx") == in_float


def test_a_head_takes_float32_dense_vectors(students: Network) -> None:
    dense = images(64, TCN).flatten(1)[:, :128].float() / 64 - 2
    graph = to_graph(students.head, dense[:2], "dense", "logits")
    quantized = quantize(graph, ranges(graph, dense.numpy()), None, None)
    (given,) = quantized.graph.input
    assert (given.name, given.type.tensor_type.elem_type) == ("dense", onnx.TensorProto.FLOAT)
    expected = students.head(dense).detach().numpy()
    assert np.abs(run(quantized, dense.numpy()) - expected).max() < 0.1 * np.ptp(expected)


def test_the_float32_graph_is_left_alone_and_the_order_of_images_does_not_matter(float32: onnx.ModelProto) -> None:
    before = float32.SerializeToString(deterministic=True)
    samples = CALIBRATION.numpy()[:100]
    first, second = (
        quantize(float32, ranges(float32, part), pixels_of(TCN), TCN.shape) for part in (samples, samples[::-1].copy())
    )
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)
    assert float32.SerializeToString(deterministic=True) == before


def test_a_layer_in_float_has_its_own_weights_and_all_of_them_are_the_float32_graph(
    float32: onnx.ModelProto, merged: onnx.ModelProto
) -> None:
    found, given = ranges(float32, CALIBRATION.numpy()), images(50, TCN).numpy()
    learning = [node for node in float32.graph.node if node.op_type in ("Conv", "Gemm")]
    plain = from_pixels(float32, pixels_of(TCN), TCN.shape)
    expected, errors = run(plain, given), []
    for in_float in ([], [learning[0].name], [node.name for node in float32.graph.node]):
        partly = quantize(float32, found, pixels_of(TCN), TCN.shape, in_float=in_float)
        weights = {learning[0].input[1], learning[-1].input[1]} & set(constants(partly))
        assert len(weights) == (0 if not in_float else 1 if len(in_float) == 1 else 2)
        errors.append(float(np.abs(run(partly, given) - expected).max()))
    assert errors[0] > 0 == errors[2] and errors[1] not in (errors[0], 0)


@pytest.mark.parametrize("model", ["mlp-30", "lenet5", "tcn-student-4"])
def test_a_layer_in_float_is_so_in_onnxruntime(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, a middle and the last one. Its values are those of the file as it reads, where nothing is fused."""
    info, given = data_of(model), images(100, data_of(model))
    samples = normalise(given, info)
    graph = to_graph(network(model), samples[:2], "pixels", "logits")
    learning, found = (
        [node for node in graph.graph.node if node.op_type in ("Conv", "Gemm")],
        ranges(graph, samples.numpy()),
    )
    for kept in (learning[0], learning[len(learning) // 2], learning[-1]):
        quantized = quantize(graph, found, pixels_of(info), info.shape, in_float=[kept.name])
        assert {node.domain for node in quantized.graph.node} == {""}
        onnx.save(quantized, tmp_path / "int8.onnx")
        assert float_nodes(tmp_path / "int8.onnx") == [f"{kept.name} ({kept.op_type})"]
        (as_it_reads,) = activations(quantized, given.numpy(), ["logits"], len(given))
        fused, exact = run(quantized, given.numpy()), as_it_reads["logits"]
        # Of what is left in int8 a sum may lie just between two levels.
        assert np.median(np.abs(fused - exact)) < 1e-6 and np.abs(fused - exact).max() < 2e-3 * np.ptp(exact)
    with monkeypatch.context() as patched:  # what onnxruntime does by itself
        patched.setattr("exporters.int8._ROUNDED_WHEN_LOADED", ())
        kept = learning[len(learning) // 2]
        onnx.save(quantize(graph, found, pixels_of(info), info.shape, in_float=[kept.name]), tmp_path / "int8.onnx")
    assert len(learning) < 3 or float_nodes(tmp_path / "int8.onnx") == []


def test_what_moves_values_between_two_layers_in_float_is_in_float_too(tmp_path: Path) -> None:
    info = data_of("lenet5")
    samples = normalise(images(50, info), info)
    graph = to_graph(network("lenet5"), samples[:2], "pixels", "logits")
    both = [node for layer in layers(graph) if layer.operator == "Conv" for node in layer.nodes]
    quantized = quantize(graph, ranges(graph, samples.numpy()), pixels_of(info), info.shape, in_float=both)
    onnx.save(quantized, tmp_path / "int8.onnx")
    between, after = (node.name for node in graph.graph.node if node.op_type == "MaxPool")
    float_ones = {name.split()[0] for name in float_nodes(tmp_path / "int8.onnx")}
    assert between in float_ones and after not in float_ones


def test_pixels_are_taken_as_they_are_beside_a_layer_in_float(float32: onnx.ModelProto) -> None:
    """One of two members has its first layer in float, and takes normalised pixels; the other one takes them in integers."""
    found = ranges(float32, CALIBRATION.numpy())
    first, second = (node.name for node in float32.graph.node if "pixels" in node.input)
    quantized = quantize(float32, found, pixels_of(TCN), TCN.shape, in_float=[first])
    takers = [node for node in quantized.graph.node if "image" in node.input]
    assert [node.op_type for node in takers] == ["DequantizeLinear"] * 2
    assert not [node for node in quantized.graph.node if node.op_type == "QuantizeLinear" and "image" in node.input[0]]
    own = constants(quantized)
    scales = [own[node.input[1]] for node in takers]
    assert sorted(scale.shape for scale in scales) == [(), (28,)]  # an image has one channel, so along its rows
    assert {float(value) for scale in scales for value in scale.reshape(-1)} == {pixels_of(TCN).scale}
    assert second in {node.name for node in quantized.graph.node}


# Networks that bring their scales


SMALL = {8: (64, "int8", 20), 4: (7, "int4", 21), 2: (1, "int2", 25)}  # largest integer, type in the file, opset


@pytest.mark.parametrize(
    ("models", "view", "bits"),
    [
        (["tcn-student-4"] * 2, [], 8),
        (["tcn-student-4"] * 2, [], 4),
        (["tcn-student-4"] * 2, [], 2),
        (["compact-4"], [], 8),
        (["resnet-1-1-0-0"], [], 8),
        (["resnet-1-1-0-0"], [], 4),
        (["resnet-1-1-0-0"], [], 2),
        (["mlp-30"], [LowResolution(7)], 8),
        (["compact-4"], [Centre(20)], 2),
    ],
    ids=str,
)
def test_what_was_trained_quantized_is_fused_whole_and_computes_the_same(
    models: list[str], view: list[nn.Module], bits: int, tmp_path: Path
) -> None:
    info, module = data_of(models[0]), network(*models)
    if view:
        module.members = nn.ModuleList(nn.Sequential(*view, member) for member in module.members)
    quantized_network(module, bits, 1)
    given = images(48, info)
    samples = normalise(given, info)
    module.head.train()
    for part in module.modules():
        part.training = not isinstance(part, nn.BatchNorm2d)
    module(samples)
    module.eval()

    graph = to_graph(rounded(module), samples[:2], "pixels", "logits")
    int8 = quantize_trained(graph, weight_limits(module), pixels_of(info), info.shape)
    (image,) = int8.graph.input
    assert (image.name, image.type.tensor_type.elem_type) == ("image", onnx.TensorProto.UINT8)
    known = constants(int8)
    weights = {name: value for name, value in known.items() if ".weight.int" in name}
    limit, stored, opset = SMALL[bits]
    assert [entry.version for entry in int8.opset_import] == [opset]
    found_bits = [(name.split(".")[-1], value.dtype.name) for name, value in weights.items()]
    outer = len(models) + 1  # first layers, and the head
    inner = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in module.modules()) - outer
    small = "int" if bits == 8 else stored
    assert sorted(found_bits) == sorted([("int", "int8")] * outer + [(small, stored)] * inner)
    for value in weights.values():
        largest = np.abs(value.astype(np.int8)).reshape(len(value), -1).max(1)
        assert set(largest) == {64 if value.dtype == np.int8 else limit}
    assert [name for name, value in known.items() if value.dtype == np.float32 and value.ndim > 1] == []

    simulated = with_rounded_biases(fold_batch_norm(rounded(module)), pixels_of(info).scale)
    expected, found = answers(simulated, given, info).numpy(), run(int8, given.numpy())
    difference = np.abs(found - expected) / np.ptp(expected)
    assert np.median(difference) < 1e-4 and difference.max() < 0.02  # now and then a value rounds to the next level
    difference = np.abs(found - answers(module, given, info).numpy()) / np.ptp(expected)
    assert np.median(difference) < 0.002 and difference.max() < 0.02  # of training, which keeps biases in float
    onnx.save(int8, tmp_path / "int8.onnx")
    assert float_nodes(tmp_path / "int8.onnx") == []


def test_a_file_of_fewer_bits_has_as_many_bytes_fewer() -> None:
    """Half and a quarter of the inner layers' weights; scales and biases stay, and nodes and names are a few more bytes."""
    sizes = {}
    for bits in SMALL:
        module = quantized_network(network("compact-teacher"), bits, 1).eval()
        info = data_of("compact-teacher")
        samples = normalise(images(4, info), info)
        module.train()(samples)
        graph = to_graph(rounded(module.eval()), samples[:2], "pixels", "logits")
        made = quantize_trained(graph, weight_limits(module), pixels_of(info), info.shape)
        sizes[bits] = len(made.SerializeToString())
    inner = 9 * (32 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    assert 0 <= sizes[4] - (sizes[8] - inner / 2) < 1000
    assert 0 <= sizes[2] - (sizes[8] - inner * 3 / 4) < 1000


def linear(weight: torch.Tensor, bias: torch.Tensor, *, rounds: bool = True) -> onnx.ModelProto:
    """A head on dense vectors with these weights, as they are."""
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    module = quantized_network(Network([nn.Identity()], layer), 8, 1).train()
    module(torch.tensor([[-1.0] * weight.shape[1], [1.0] * weight.shape[1]]))
    module.head.rounding = nn.Identity()  # type: ignore[union-attr]
    if not rounds:
        module.head.given = nn.Identity()  # type: ignore[union-attr]
    return to_graph(module.head.eval(), torch.zeros(2, weight.shape[1]), "dense", "logits")


def test_integers_and_scales_by_hand() -> None:
    """A channel of one size, one of zeros, one that is so small that its bias needs a larger scale."""
    weight = torch.tensor([[64.0, -32.0, 1.0], [0.0, 0.0, 0.0], [6.4e-14, 0.0, 0.0]])
    found = constants(quantize_trained(linear(weight, torch.tensor([2.0, 0.0, 3.0])), {"weight": 64}, None, None))
    (name,) = (name.removesuffix(".weight.int") for name in found if name.endswith(".weight.int"))
    assert found[f"{name}.weight.int"].tolist() == [[64, -32, 1], [0, 0, 0], [0, 0, 0]]
    scale, input_scale = found[f"{name}.weight.scale"], np.float32(2 / 255)
    assert scale[:2].tolist() == [1, 1]
    assert np.array_equal(found[f"{name}.bias.scale"], scale * input_scale)  # to the last bit, or nothing is fused
    assert found[f"{name}.bias.int"].tolist()[:2] == [255, 0]
    assert found[f"{name}.bias.int"][2] * found[f"{name}.bias.scale"][2] == pytest.approx(3, rel=1e-6)


def test_integers_of_two_bits_by_hand() -> None:
    weight = torch.tensor([[0.5, -0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0, -2.0]])
    made = quantize_trained(linear(weight, torch.zeros(2)), {"weight": 1}, None, None)
    (packed,) = (value for value in made.graph.initializer if value.name.endswith(".weight.int.int2"))
    assert packed.data_type == onnx.TensorProto.INT2 and len(packed.raw_data) == 3  # ten of them, four a byte
    assert numpy_helper.to_array(packed).astype(int).tolist() == [[1, -1, 0, 1, 0], [0, 0, 0, 0, -1]]
    (scale,) = (numpy_helper.to_array(value) for value in made.graph.initializer if value.name.endswith("weight.scale"))
    assert scale.tolist() == [0.5, 2]
    taken = 127 * 2 / 255  # 1, the end of the range of what it takes, on its grid
    found = run(made, np.array([[1.0, 1, 1, 1, 1]], np.float32))
    np.testing.assert_allclose(found, [[0.5 * taken, -2 * taken]], rtol=1e-6)


def test_weights_off_their_grid_and_inputs_that_are_not_rounded_are_refused() -> None:
    weight, bias = torch.tensor([[64.0, 0.5]]), torch.zeros(1)
    with pytest.raises(ExportError, match=r"\(Gemm\): its weights do not lie on a grid of 64 steps on each side of 0"):
        quantize_trained(linear(weight, bias), {"weight": 64}, None, None)
    with pytest.raises(ExportError, match=r"\(Gemm\) takes what is not rounded"):
        quantize_trained(linear(weight.round(), bias, rounds=False), {"weight": 64}, None, None)


def test_uint8_weights_of_eight_bits_are_added_exactly_where_int8_ones_saturate() -> None:
    """Pairs of 255 x 127 are more than the 16 bits in which x86-avx2 adds them; with zero points of 128 they are not."""
    layer = nn.Linear(64, 2, bias=False)
    with torch.no_grad():
        layer.weight[0], layer.weight[1] = 1, 0.9
    samples = np.stack([np.zeros(64), np.full(64, 255)]).astype(np.float32)
    graph = to_graph(layer.eval(), torch.from_numpy(samples), "dense", "logits")
    exact, found = 64 * 255 * np.array([1, 0.9]), ranges(graph, samples)
    for form in FORMS.values():
        assert run(quantize(graph, found, None, None, form), samples[1:])[0] == pytest.approx(exact, rel=0.005)
    full = quantize(graph, found, None, None, replace(FORMS["int8"], seven_bits=False))
    saturates = cpu_class(Path("/proc/cpuinfo").read_text(), platform.machine()) == "x86-avx2"
    assert (run(full, samples[1:])[0] < 0.99 * exact).any() == saturates


def test_eight_bits_tell_weights_apart_that_seven_bits_do_not() -> None:
    layer = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        layer.weight[:, 0] = torch.tensor([100.0, 99.0, -127.0])
    samples = np.array([[0], [1]], np.float32)
    graph = to_graph(layer.eval(), torch.from_numpy(samples), "dense", "logits")
    tensor = replace(FORMS["int8"], by_channel=False)  # by channel each row has a scale of its own
    for form, apart in ((tensor, False), (FORMS["int8-u8u8-tensor"], True)):
        first, second, _ = run(quantize(graph, ranges(graph, samples), None, None, form), samples[1:])[0]
        assert (first > second) == apart


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_fused_whole_and_near_float32(
    form: str, float32: onnx.ModelProto, students: Network, tmp_path: Path
) -> None:
    given = images(64, TCN)
    plain = run(float32, normalise(given, TCN).numpy())
    model = quantize(float32, ranges(float32, CALIBRATION.numpy()), pixels_of(TCN), TCN.shape, FORMS[form])
    path = tmp_path / "form.onnx"
    path.write_bytes(model.SerializeToString())
    assert float_nodes(path) == []
    assert np.abs(run(model, given.numpy()) - plain).mean() < 0.02 * np.abs(plain).mean()
    weights = [value for value in constants(model).values() if value.ndim > 1]
    assert {value.dtype.name for value in weights} == {"uint8" if "u8u8" in form else "int8"}
