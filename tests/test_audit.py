"""The audit names what onnxruntime computes in float, and only that."""

from pathlib import Path

import onnx
import pytest
import torch
from random_networks import data_of, images, pixels_of
from torch import Tensor, nn

from exporters.audit import float_nodes
from exporters.float32 import from_pixels, to_graph
from exporters.int8 import quantize
from kdedge.data.batches import normalise

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
    quantized = quantize(graph, SAMPLES.numpy(), pixels_of(INFO), INFO.shape)
    onnx.save(quantized, tmp_path / "int8.onnx")
    listed = {f"{node.name} ({node.op_type})" for node in quantized.graph.node if node.op_type in in_float}
    assert set(float_nodes(tmp_path / "int8.onnx")) == listed
    assert len(listed) == len(in_float)


def test_of_a_float32_file_every_layer_is_listed(tmp_path: Path) -> None:
    graph = from_pixels(to_graph(around(nn.ReLU()), SAMPLES[:2], "pixels", "logits"), pixels_of(INFO), INFO.shape)
    onnx.save(graph, tmp_path / "fp32.onnx")
    found = " ".join(float_nodes(tmp_path / "fp32.onnx"))
    assert found.count("Conv)") == 2 and found.count("Gemm)") == 1
