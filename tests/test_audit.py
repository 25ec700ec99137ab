"""What a file has to be before it is run, and that the audit names what onnxruntime computes in float, and only that."""

from collections.abc import Callable
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from random_networks import data_of, images, network, pixels_of
from tiny_export import exported, float_nodes, pixels, write_image_network
from torch import Tensor, nn

from exporters.calibration import ranges
from exporters.float32 import from_pixels, to_graph
from exporters.int8 import quantize, quantize_trained
from kdedge.audit import audit, check_graph, weight_bits
from kdedge.data.batches import normalise
from kdedge.devices import DEVICES, local
from kdedge.errors import DeviceError, RunError
from kdedge.quantize.layers import quantized_network, rounded, weight_limits

INFO = data_of("lenet5")
SAMPLES = normalise(images(32, INFO), INFO)


class SubtractMean(nn.Module):
    """An operator for which onnxruntime has no integer kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


def around(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), part, nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(2 * 28 * 28, 10)).eval()


@pytest.mark.parametrize(
    ("part", "in_float"),
    [
        (nn.ReLU(), set()),
        (nn.MaxPool2d(3, 1, 1), set()),
        (nn.ELU(), {"Elu"}),
        (SubtractMean(), {"ReduceMean", "Sub"}),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_stays_in_float_is_listed(part: nn.Module, in_float: set[str], tmp_path: Path) -> None:
    graph = to_graph(around(part), SAMPLES[:2], "pixels", "logits")
    quantized = quantize(graph, ranges(graph, SAMPLES.numpy()), pixels_of(INFO), INFO.shape)
    onnx.save(quantized, tmp_path / "int8.onnx")
    listed = {f"{node.name} ({node.op_type})" for node in quantized.graph.node if node.op_type in in_float}
    assert set(float_nodes(tmp_path / "int8.onnx")) == listed
    assert len(listed) == len(in_float)


def test_what_is_cast_to_float_stays_in_float(tmp_path: Path) -> None:
    path = write_image_network(tmp_path / "int8.onnx", pixels(list(range(10))))
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Flatten", "Cast", "MatMul"]
    assert float_nodes(path) == ["product (MatMul)"]


@pytest.fixture(scope="module")
def four_bits() -> onnx.ModelProto:
    module = quantized_network(network("lenet5"), 4, 1)
    module.train()(SAMPLES)
    graph = to_graph(rounded(module.eval()), SAMPLES[:2], "pixels", "logits")
    return quantize_trained(graph, weight_limits(module), pixels_of(INFO), INFO.shape)


def test_int4_that_onnxruntime_does_not_unpack_stays_in_float(four_bits: onnx.ModelProto, tmp_path: Path) -> None:
    """So it is the Cast that keeps these layers integer."""
    onnx.save(four_bits, tmp_path / "unpacked.onnx")
    assert float_nodes(tmp_path / "unpacked.onnx") == []
    direct = onnx.ModelProto()
    direct.CopyFrom(four_bits)
    stored = {node.output[0]: node.input[0] for node in direct.graph.node if node.op_type == "Cast"}
    zeros = {value.name: value for value in direct.graph.initializer if value.name.endswith(".weight.zero")}
    layers = set()
    for node in list(direct.graph.node):
        if node.op_type == "Cast":
            direct.graph.node.remove(node)
        elif node.op_type == "DequantizeLinear" and node.input[0] in stored:
            node.input[0] = stored[node.input[0]]
            zero = zeros[node.input[2]]
            packed = numpy_helper.to_array(zero).astype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4))
            zero.CopyFrom(numpy_helper.from_array(packed, zero.name))
            layers |= {f"{one.name} ({one.op_type})" for one in direct.graph.node if node.output[0] in one.input}
    onnx.checker.check_model(direct, full_check=True)
    onnx.save(direct, tmp_path / "direct.onnx")
    assert len(layers) == 3 and layers <= set(float_nodes(tmp_path / "direct.onnx"))


def test_bits_of_weights_are_read_off_the_graph(four_bits: onnx.ModelProto) -> None:
    graph = to_graph(around(nn.ReLU()), SAMPLES[:2], "pixels", "logits")
    int8 = quantize(graph, ranges(graph, SAMPLES.numpy()), pixels_of(INFO), INFO.shape)
    found = [weight_bits(model.graph) for model in (from_pixels(graph, pixels_of(INFO), INFO.shape), int8, four_bits)]
    assert found == [32, 8, 4]


def test_of_a_float32_file_every_layer_is_listed(tmp_path: Path) -> None:
    graph = from_pixels(to_graph(around(nn.ReLU()), SAMPLES[:2], "pixels", "logits"), pixels_of(INFO), INFO.shape)
    onnx.save(graph, tmp_path / "fp32.onnx")
    found = " ".join(float_nodes(tmp_path / "fp32.onnx"))
    assert found.count("Conv)") == 2 and found.count("Gemm)") == 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A network that takes an image."""
    return write_image_network(tmp_path / "whole.onnx", pixels(list(range(10))))


def test_files_are_answered_for_in_their_order_with_the_device(path: Path) -> None:
    files = [exported(path, "whole", "teacher", "fp32")] * 2
    device, found = audit(path.parent, files)
    assert device["onnxruntime"] == onnxruntime.__version__ and len(found) == 2


def test_a_file_that_was_changed_or_cannot_be_loaded_is_not_audited(path: Path) -> None:
    file = exported(path, "whole", "teacher", "int8")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"whole\.onnx was changed"):
        audit(path.parent, [file])
    path.write_bytes(b"")
    with pytest.raises(DeviceError, match=r"runner: whole\.onnx cannot be loaded"):
        audit(path.parent, [exported(path, "whole", "teacher", "int8")])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "answered for other files"),
        ([{"name": "whole.onnx", "graph": "no digits"}], "whole.onnx: the runner's answer is no graph"),
        ([{"name": "whole.onnx", "graph": "ff"}], "whole.onnx: the runner's answer is no graph"),
    ],
)
def test_a_device_that_answers_nonsense_is_not_believed(
    path: Path, monkeypatch: pytest.MonkeyPatch, files: list[dict[str, str]], said: str
) -> None:
    monkeypatch.setitem(DEVICES, "liar", lambda job, given: local.run(job, given) | {"files": files})
    with pytest.raises(DeviceError, match=said):
        audit(path.parent, [exported(path, "whole", "teacher", "int8")], device="liar")


def test_a_graph_that_stands_alone_and_is_as_the_manifest_says_passes(path: Path) -> None:
    check_graph(path, exported(path, "whole", "teacher", "fp32"), 20)


def outside(tensor: onnx.TensorProto, location: str = "../weights.bin") -> None:
    """Move a tensor's values to another file, as onnx marks it."""
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def in_a_branch(model: onnx.ModelProto, node: onnx.NodeProto) -> None:
    """Put a node where no loop over the nodes of the graph finds it."""
    value = helper.make_tensor_value_info("chosen", TensorProto.FLOAT, [])
    branch = helper.make_graph([node], "branch", [], [value])
    model.graph.node.append(helper.make_node("If", ["image"], ["x"], then_branch=branch, else_branch=branch))


def external(model: onnx.ModelProto) -> None:
    outside(model.graph.initializer[0])


def external_beside(model: onnx.ModelProto) -> None:
    outside(model.graph.initializer[0], "weights.bin")


def external_in_a_branch(model: onnx.ModelProto) -> None:
    constant = helper.make_tensor("hidden", TensorProto.FLOAT, [1], [0.0])
    outside(constant)
    in_a_branch(model, helper.make_node("Constant", [], ["chosen"], value=constant))


def custom(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "com.example"


def custom_in_a_branch(model: onnx.ModelProto) -> None:
    in_a_branch(model, helper.make_node("Open", [], ["chosen"], domain="com.example"))


def custom_in_a_function(model: onnx.ModelProto) -> None:
    inner = [helper.make_node("Open", ["x"], ["y"], domain="com.example")]
    model.functions.append(helper.make_function("", "Relu", ["x"], ["y"], inner, []))


def other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 19


def no_opset(model: onnx.ModelProto) -> None:
    model.ClearField("opset_import")


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT


def other_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "dense"


def other_shape(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 12


def no_tensor(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.sequence_type.elem_type.tensor_type.elem_type = TensorProto.FLOAT


def no_graph(model: onnx.ModelProto) -> None:
    model.ClearField("graph")


IN_ANOTHER_FILE = "is in another file, expected one file that holds all of them"
NOT_ONNX = "is not one of ONNX's own"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (external, f"its tensor 'weights' {IN_ANOTHER_FILE}"),
        (external_beside, f"its tensor 'weights' {IN_ANOTHER_FILE}"),
        (external_in_a_branch, f"its tensor 'hidden' {IN_ANOTHER_FILE}"),
        (custom, f"its operator 'com.example.Flatten' {NOT_ONNX}"),
        (custom_in_a_branch, f"its operator 'com.example.Open' {NOT_ONNX}"),
        (custom_in_a_function, f"its operator 'com.example.Open' {NOT_ONNX}"),
        (other_opset, "expected opset 20, as the manifest says, found 19"),
        (no_opset, "expected opset 20, as the manifest says, found none"),
        (
            other_input,
            "expected the inputs image uint8 ['batch', 1, 28, 28], as the manifest says, found image float32",
        ),
        (other_output, "expected the outputs logits float32 ['batch', 10], as the manifest says, found dense float32"),
        (other_shape, "as the manifest says, found logits float32 ['batch', 12]"),
        (no_tensor, "is no ONNX file, or a damaged one"),
        (no_graph, "as the manifest says, found none"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_graph_that_is_something_else_is_refused(
    path: Path, change: Callable[[onnx.ModelProto], None], said: str
) -> None:
    file = exported(path, "whole", "teacher", "fp32")
    model = onnx.load(path)
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(RunError) as caught:
        check_graph(path, file, 20)
    assert str(caught.value).startswith(str(path)) and said in str(caught.value)


def test_a_truncated_file_is_refused_wherever_it_ends(path: Path) -> None:
    file, whole = exported(path, "whole", "teacher", "fp32"), path.read_bytes()
    for end in [*range(60), *range(60, len(whole), 997), *range(len(whole) - 60, len(whole))]:
        path.write_bytes(whole[:end])
        with pytest.raises(RunError, match=r"whole\.onnx"):
            check_graph(path, file, 20)


def test_names_that_are_no_text_are_refused(path: Path) -> None:
    file = exported(path, "whole", "teacher", "fp32")
    path.write_bytes(path.read_bytes().replace(b"image", b"im\xffge"))
    with pytest.raises(RunError, match="is no ONNX file, or a damaged one: .*valid string"):
        check_graph(path, file, 20)
