"""A torch module as a float32 ONNX graph whose bytes depend on the network alone, not on where its source lies."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnx import helper, numpy_helper
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

OPSET = 20
PIXELS = "pixels"  # the normalised image inside the graph, float32


@dataclass(frozen=True)
class PixelScale:
    """Normalisation as quantization parameters: x = (pixel - mean) * scale, one of each for all channels."""

    mean: int  # the zero point, 0 to 255
    scale: float  # float32


class ExportError(Exception):
    """A network that cannot be exported, or a graph that is not what it should be; `str()` says why."""


def to_graph(module: nn.Module, example: Tensor, input_name: str, output_name: str) -> onnx.ModelProto:
    """A module of one float32 input [batch, ...] and one output [batch, n] as a checked graph with a free batch.

    `example` is a batch of at least 2: a batch of 1 may be taken for a constant. Raises ExportError.
    """
    folded = fold_batch_norm(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself
        program = torch.onnx.export(
            folded,
            (example.contiguous(),),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=({0: "batch"},),
        )
    assert program is not None
    graph = clean(program.model)
    normalising = [node.name for node in graph.graph.node if node.op_type == "BatchNormalization"]
    if normalising:
        raise ExportError(
            f"batch norm is left in the graph ({', '.join(normalising)}): it can be folded only where it follows a "
            "convolution in an nn.Sequential"
        )
    if (found := graph.opset_import[0].version) != OPSET:
        raise ExportError(f"the exporter wrote opset {found} instead of {OPSET}")
    onnx.checker.check_model(graph, full_check=True)
    return graph


def with_weights(graph: onnx.ModelProto, module: nn.Module) -> onnx.ModelProto | None:
    """What `to_graph` makes of `module`, from the graph of one with equal layers: to trace a network takes seconds.

    None when the graph has no place for some weight: the exporter leaves out biases that are 0, and one of two equal weights.
    """
    filled, weights = copy.deepcopy(graph), fold_batch_norm(module).state_dict()
    for tensor in filled.graph.initializer:
        weight = weights.get(tensor.name)
        if weight is not None and list(weight.shape) == list(tensor.dims):
            tensor.CopyFrom(numpy_helper.from_array(weights.pop(tensor.name).numpy(), tensor.name))
    return None if weights else filled


def fold_batch_norm(module: nn.Module) -> nn.Module:
    """A copy in eval mode in which every batch norm that follows a convolution has become part of it."""
    # Channels last, as in training, the exporter would write out the strides of an average pool in ten nodes.
    folded = copy.deepcopy(module).cpu().eval().to(memory_format=torch.contiguous_format)
    for part in [folded, *folded.modules()]:
        if not isinstance(part, nn.Sequential):
            continue
        for position in range(len(part) - 1):
            convolution, norm = part[position], part[position + 1]
            if isinstance(convolution, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                part[position] = fuse_conv_bn_eval(convolution, norm)
                part[position + 1] = nn.Identity()
    return folded


def clean(model: Any) -> onnx.ModelProto:
    """The graph of an onnx_ir model without what the exporter noted about itself: source paths, line numbers, versions."""
    ClearMetadataAndDocStringPass()(model)
    values = [
        *model.graph.inputs,
        *model.graph.initializers.values(),
        *(out for node in model.graph for out in node.outputs),
    ]
    for value in values:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "kdedge", None
    graph: onnx.ModelProto = onnx_ir.to_proto(model)
    graph.graph.name = "kdedge"
    return graph


def from_pixels(graph: onnx.ModelProto, pixels: PixelScale, shape: tuple[int, int, int]) -> onnx.ModelProto:
    """The graph with raw pixels as its input: `image`, uint8 [batch, C, H, W], instead of normalised ones.

    Pixels are a quantized tensor already, so normalising them is one DequantizeLinear, and exact.
    """
    graph = copy.deepcopy(graph)
    inner = graph.graph.input[0].name
    graph.graph.node.insert(
        0, helper.make_node("DequantizeLinear", ["image", "pixel_scale", "pixel_mean"], [inner], "normalise")
    )
    graph.graph.initializer.extend(
        [
            numpy_helper.from_array(np.array(pixels.scale, np.float32), "pixel_scale"),
            numpy_helper.from_array(np.array(pixels.mean, np.uint8), "pixel_mean"),
        ]
    )
    image = helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["batch", *shape])
    graph.graph.input[0].CopyFrom(image)
    onnx.checker.check_model(graph, full_check=True)
    return graph
