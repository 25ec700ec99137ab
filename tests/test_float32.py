"""Float32 graphs: they compute what torch computes, in one form, and their bytes depend on the network alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from random_networks import answers, data_of, images, network, pixels_of
from torch import nn

from exporters.float32 import OPSET, ExportError, fold_batch_norm, from_pixels, to_graph, with_weights
from kdedge.data.batches import normalise
from kdedge.data.catalog import DATASETS, DatasetInfo

ROOT = Path(__file__).parent.parent

# All that networks of ours become; above all no BatchNormalization, and no arithmetic on shapes.
OPERATORS = {"DequantizeLinear", "Conv", "Relu", "MaxPool", "Add", "AveragePool", "Reshape", "Gemm", "Concat"}


def exported(module: nn.Module, info: DatasetInfo) -> onnx.ModelProto:
    graph = to_graph(module, normalise(images(2, info), info), "pixels", "logits")
    return from_pixels(graph, pixels_of(info), info.shape)


def run(graph: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": image})[0])


@pytest.mark.parametrize(
    "models", [["tcn-student-4"] * 2, ["mlp-30"], ["lenet5"], ["vgg-student-8"], ["resnet-1-1-0-0"]], ids=" ".join
)
def test_every_family_computes_in_onnxruntime_what_it_computes_in_torch(models: list[str]) -> None:
    info, module = data_of(models[0]), network(*models)
    graph = exported(module, info)
    for batch in (1, 3, 5):
        given = images(batch, info, seed=batch)
        expected = answers(module, given, info).numpy()
        np.testing.assert_allclose(run(graph, given.numpy()), expected, rtol=0, atol=1e-5 * np.ptp(expected))

    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", 20)] == [("", OPSET)]
    assert {node.op_type for node in graph.graph.node} <= OPERATORS
    assert b"torch" not in graph.SerializeToString()  # no notes of the exporter about itself
    onnx.checker.check_model(graph, full_check=True)
    image, logits = graph.graph.input[0].type.tensor_type, graph.graph.output[0].type.tensor_type
    assert (graph.graph.input[0].name, image.elem_type) == ("image", onnx.TensorProto.UINT8)
    assert [axis.dim_param or axis.dim_value for axis in image.shape.dim] == ["batch", *info.shape]
    assert (graph.graph.output[0].name, logits.elem_type) == ("logits", onnx.TensorProto.FLOAT)
    assert [axis.dim_param or axis.dim_value for axis in logits.shape.dim] == ["batch", 10]


@pytest.mark.parametrize("model", ["tcn-student-4", "vgg-student-8", "resnet-1-1-0-0"])
def test_a_graph_with_other_weights_is_the_graph_of_their_network(model: str) -> None:
    example = normalise(images(2, data_of(model)), data_of(model))
    first, second = (network(model, seed=seed) for seed in (1, 2))
    graph, other = (to_graph(module, example, "pixels", "logits") for module in (first, second))
    before = graph.SerializeToString(deterministic=True)
    assert before != other.SerializeToString(deterministic=True)
    found = with_weights(graph, second)
    assert found is not None
    assert found.SerializeToString(deterministic=True) == other.SerializeToString(deterministic=True)
    assert graph.SerializeToString(deterministic=True) == before


def test_a_graph_without_a_place_for_a_weight_is_no_graph_of_that_network() -> None:
    graph = to_graph(nn.Sequential(nn.Linear(4, 3)), torch.zeros(2, 4), "pixels", "logits")
    for other in (nn.Linear(4, 2), nn.Linear(5, 3)):
        assert with_weights(graph, nn.Sequential(other)) is None


def test_export_leaves_the_module_as_it_was() -> None:
    module = network("vgg-student-8").train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    exported(module, data_of("vgg-student-8"))
    assert module.training
    assert any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("name", DATASETS)
def test_every_pixel_value_is_normalised_to_the_bits_that_training_saw(name: str) -> None:
    info = DATASETS[name]
    graph = to_graph(nn.Flatten(), torch.zeros(2, 1, 16, 16), "pixels", "logits")
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = run(from_pixels(graph, pixels_of(info), (1, 16, 16)), every.numpy())
    assert found.tobytes() == normalise(every, info).flatten(1).numpy().tobytes()


def test_raw_pixels_are_taken_by_a_copy() -> None:
    graph = to_graph(nn.Flatten(), torch.zeros(2, 1, 16, 16), "pixels", "logits")
    from_pixels(graph, pixels_of(DATASETS["mnist"]), (1, 16, 16))
    assert [value.name for value in graph.graph.input] == ["pixels"]
    assert "DequantizeLinear" not in {node.op_type for node in graph.graph.node}


def test_folding_keeps_every_output_and_leaves_no_batch_norm() -> None:
    module = network("vgg-student-8")
    folded = fold_batch_norm(module)
    given = normalise(images(4, data_of("vgg-student-8")), data_of("vgg-student-8"))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert torch.allclose(folded(given), module(given), rtol=1e-4, atol=1e-4)


def test_folding_works_on_a_sequential_that_is_the_module_itself() -> None:
    folded = fold_batch_norm(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    assert [type(part) for part in folded.children()] == [nn.Conv2d, nn.Identity]


def test_a_batch_norm_that_cannot_be_folded_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Flatten())
    with pytest.raises(ExportError, match=r"batch norm is left in the graph \(.+\): it can be folded only where"):
        to_graph(module, torch.zeros(2, 1, 8, 8), "pixels", "logits")


EXPORT = """
import hashlib, sys
from pathlib import Path
import torch
import exporters, kdedge
from exporters.calibration import ranges
from exporters.float32 import PixelScale, from_pixels, to_graph
from exporters.int8 import quantize
from kdedge.models.network import build

for package in (exporters, kdedge):
    assert Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
torch.manual_seed(0)
module = build(["tcn-student-4"] * 2, 128, 10)
pixels, shape, samples = PixelScale(73, 0.0111), (1, 28, 28), torch.randn(64, 1, 28, 28)
graph = to_graph(module, samples[:2], "pixels", "logits")
for file in (from_pixels(graph, pixels, shape), quantize(graph, ranges(graph, samples.numpy()), pixels, shape)):
    content = file.SerializeToString(deterministic=True)
    assert sys.argv[1].encode() not in content
    print(len(content), hashlib.sha256(content).hexdigest())
"""


def test_bytes_do_not_depend_on_where_the_source_lies_nor_on_the_process(tmp_path: Path) -> None:
    running = []
    for number in ("1", "2"):
        folder = tmp_path / ("source" + number * int(number))
        for package in ("kdedge", "exporters"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONHASHSEED": number}
        command = [sys.executable, "-c", EXPORT, str(folder)]
        running.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True))
    first, second = (process.communicate(timeout=120)[0].splitlines() for process in running)
    assert [process.returncode for process in running] == [0, 0]
    assert len(set(first)) == 2  # fp32 and int8
    assert first == second
