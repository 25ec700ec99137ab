"""A float32 graph in int8, as QDQ that onnxruntime fuses, portable between CPUs: with ranges from samples, or with its own.

Activations are uint8. CPUs that add two u8 x s8 products in 16 bits (AVX2 and AVX-512 without VNNI) saturate with weights of
8 bits in int8, and lose accuracy without a word: weights are int8 in a range of 7 bits, or uint8, of which the sums are exact.
"""

from __future__ import annotations

import copy
import logging
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnxruntime.quantization import QuantFormat, QuantType, quantize_static, save_tensors_data

from exporters.calibration import Ranges
from exporters.float32 import ExportError, PixelScale, from_pixels


@dataclass(frozen=True)
class Form:
    """How the weights of an int8 graph are written."""

    weights: QuantType
    symmetric: bool  # about 0; a zero point is then the same for all channels, which onnxruntime asks for
    by_channel: bool
    seven_bits: bool


FORMS = {
    "int8": Form(QuantType.QInt8, symmetric=True, by_channel=True, seven_bits=True),
    "int8-u8u8": Form(QuantType.QUInt8, symmetric=True, by_channel=True, seven_bits=False),
    "int8-u8u8-tensor": Form(QuantType.QUInt8, symmetric=False, by_channel=False, seven_bits=False),
}


def quantize(
    graph: onnx.ModelProto,
    ranges: Ranges,
    pixels: PixelScale | None,
    shape: tuple[int, int, int] | None,
    form: Form = FORMS["int8"],
    in_float: Collection[str] = (),
) -> onnx.ModelProto:
    """`graph`, of one float32 input, quantized in a form with the `ranges` of its tensors, as `calibration.ranges` gives them.

    The nodes `in_float` compute with their own weights, on what their neighbours round, in onnxruntime as well; what only moves
    values between two of them is in float too. With `pixels` and `shape` [C, H, W]
    the input becomes `image`, uint8: the first quantized tensor is the pixels themselves. Outputs stay float32, as the last
    layer computes them.
    """
    in_float, name = _with_moves(graph.graph, in_float), graph.graph.input[0].name
    overrides = {}
    if pixels is not None:
        scale, zero_point = np.array(pixels.scale, np.float32), np.array(pixels.mean, np.uint8)
        overrides = {name: [{"quant_type": QuantType.QUInt8, "scale": scale, "zero_point": zero_point}]}
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)
    logging.getLogger().addFilter(_not_about_preprocessing)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path, found = Path(folder) / "int8.onnx", Path(folder) / "ranges.json"
            save_tensors_data(ranges, found)
            quantize_static(
                inferred,
                str(path),
                quant_format=QuantFormat.QDQ,
                per_channel=form.by_channel,
                reduce_range=form.seven_bits,
                activation_type=QuantType.QUInt8,
                weight_type=form.weights,
                calibration_cache_path=found,
                nodes_to_exclude=[*in_float],
                extra_options={
                    "TensorQuantOverrides": overrides,
                    "WeightSymmetric": form.symmetric,
                    # Pixels that are reshaped or pooled before any layer computes are integers as well.
                    "ForceQuantizeNoInputCheck": True,
                },
            )
            quantized = onnx.load(path)
    finally:
        logging.getLogger().removeFilter(_not_about_preprocessing)
    if pixels is not None and shape is not None:
        quantized = _take_pixels(quantized, pixels, shape)
    _leave_output_in_float(quantized)
    if in_float:
        _keep_in_float(quantized, in_float, inferred)
    quantized.producer_name, quantized.producer_version = "kdedge", ""
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def _not_about_preprocessing(record: logging.LogRecord) -> bool:
    """onnxruntime advises a pre-processing whose work is done here already: folding and shapes."""
    return "pre-processing" not in record.getMessage()


def _with_moves(graph: onnx.GraphProto, in_float: Collection[str]) -> set[str]:
    """These nodes, and those between two of them that only move values."""
    makers, readers = dict[str, str](), defaultdict[str, set[str]](set)
    for node in graph.node:
        makers |= dict.fromkeys(node.output, node.name)
        for name in node.input:
            readers[name].add(node.name)
    after, before = set(in_float), set(in_float)
    moving = [node for node in graph.node if node.op_type in MOVES_ONLY]
    for node in moving:
        if makers.get(node.input[0]) in after:
            after.add(node.name)
    for node in reversed(moving):
        if before & readers[node.output[0]]:
            before.add(node.name)
    return after & before


def _take_pixels(model: onnx.ModelProto, pixels: PixelScale, shape: tuple[int, int, int]) -> onnx.ModelProto:
    """Drop the QuantizeLinear of the input: with its own scale and zero point the pixels are what it would give.

    What takes the input in float takes the pixels that are normalised.
    """
    graph, name = model.graph, model.graph.input[0].name
    for first in [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == name]:
        for node in graph.node:
            node.input[:] = ["image" if taken == first.output[0] else taken for taken in node.input]
        graph.node.remove(first)
    if any(name in node.input for node in graph.node):
        return from_pixels(model, pixels, shape)
    graph.input[0].CopyFrom(helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["batch", *shape]))
    return model


def _keep_in_float(model: onnx.ModelProto, names: Collection[str], float32: onnx.ModelProto) -> None:
    """Dequantize what the layers `names` take for each of them alone, with the scale and zero point repeated along an axis.

    The values are the same. But of a layer behind a single scale onnxruntime makes an integer one when it loads the file, and
    rounds its weights (WeightBiasQuantization); behind an axis of scales it cannot, as integer layers take a single one.
    What has no weights computes the same either way, and is left to onnxruntime.
    """
    graph = model.graph
    known = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    takes = {node.name: node.input[0] for node in float32.graph.node}
    shapes = {
        value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*float32.graph.input, *float32.graph.value_info)
    }
    for node in [node for node in graph.node if node.name in names and node.op_type in _ROUNDED_WHEN_LOADED]:
        made = makers.get(node.input[0])
        if made is None or made.op_type != "DequantizeLinear":
            continue
        shape = shapes[takes[node.name]]
        axis = next((axis for axis, size in enumerate(shape) if axis > 0 and size > 1), None)
        if axis is None:  # one value an image
            continue
        grid = [f"{node.name}.given.scale", f"{node.name}.given.zero"]
        for own, shared in zip(grid, made.input[1:], strict=True):
            graph.initializer.append(numpy_helper.from_array(np.full(shape[axis], known[shared]), own))
        given = f"{node.name}.given"
        apart = helper.make_node("DequantizeLinear", [made.input[0], *grid], [given], f"{given}.dequantize", axis=axis)
        graph.node.insert(list(graph.node).index(node), apart)
        node.input[0] = given
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    for node in [node for node in graph.node if used.isdisjoint(node.output)]:
        graph.node.remove(node)
    _remove_unused(graph)


def _leave_output_in_float(model: onnx.ModelProto) -> None:
    """Drop the last QuantizeLinear and DequantizeLinear: rounding logits to 256 levels only makes ties."""
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    last = makers[graph.output[0].name]
    if last.op_type != "DequantizeLinear" or makers[last.input[0]].op_type != "QuantizeLinear":
        return
    quantizing = makers[last.input[0]]
    inner = quantizing.input[0]
    makers[inner].output[:] = [last.output[0] if name == inner else name for name in makers[inner].output]
    graph.node.remove(quantizing)
    graph.node.remove(last)
    _remove_unused(graph)
    for info in [info for info in graph.value_info if info.name in (inner, quantizing.output[0])]:
        graph.value_info.remove(info)


_ROUNDED_WHEN_LOADED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SMALL_TYPES = {1: ("INT2", 25), 7: ("INT4", 21)}  # by the largest integer they have to hold; the opset that knows them
MOVES_ONLY = ("Reshape", "Flatten", "MaxPool", "Slice", "Pad", "Resize")  # values: it gives none that it was not given
_LARGEST_BIAS = 2.0**30  # of an int32, with room for what is added to it


def quantize_trained(
    graph: onnx.ModelProto, limits: Mapping[str, int], pixels: PixelScale | None, shape: tuple[int, int, int] | None
) -> onnx.ModelProto:
    """`graph`, of a network that was trained quantized, with integers for its weights and biases.

    It brings its scales: what its layers take goes through QuantizeLinear and DequantizeLinear, and each channel of their
    weights lies on a grid of so many steps on each side of 0 as `limits` has by their name, the largest at the last one.
    With `pixels` and `shape` [C, H, W] the input becomes `image`, uint8. Raises ExportError for a layer of which that is
    not true.
    """
    quantized = copy.deepcopy(graph) if pixels is None or shape is None else from_pixels(graph, pixels, shape)
    nodes = quantized.graph.node
    _round_before_moving(quantized.graph)
    makers = {name: node for node in nodes for name in node.output}
    known = {value.name: numpy_helper.to_array(value) for value in quantized.graph.initializer}
    for node in [node for node in nodes if node.op_type in ("Conv", "Gemm")]:
        taken = makers.get(node.input[0])
        while taken is not None and taken.op_type in MOVES_ONLY:
            taken = makers.get(taken.input[0])
        if taken is None or taken.op_type != "DequantizeLinear":
            raise ExportError(f"{node.name} ({node.op_type}) takes what is not rounded")
        weight, *biases = (known[name] for name in node.input[1:])  # the exporter leaves a bias of zeros out
        bias = biases[0] if biases else np.zeros(len(weight), np.float32)
        try:
            tensors = _integers(weight, bias, known[taken.input[1]], limits[node.input[1]])
        except ValueError as error:
            raise ExportError(f"{node.name} ({node.op_type}): {error}") from None
        for place, (integers, scale) in enumerate(tensors[: len(node.input) - 1], 1):
            name = f"{node.name}.{'bias' if place == 2 else 'weight'}"
            inputs = {
                f"{name}.int": integers,
                f"{name}.scale": scale,
                f"{name}.zero": np.zeros_like(scale, integers.dtype),
            }
            quantized.graph.initializer.extend(numpy_helper.from_array(value, key) for key, value in inputs.items())
            made = helper.make_node("DequantizeLinear", [*inputs], [name], f"{name}.dequantize", axis=0)
            nodes.insert(list(nodes).index(node), made)
            node.input[place] = name
    _remove_unused(quantized.graph)
    _pack(quantized)
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def _round_before_moving(graph: onnx.GraphProto) -> None:
    """Round what is moved or joined as the result is rounded, which changes nothing, so that integers are moved."""
    for node in reversed(list(graph.node)):
        readers = [reader for reader in graph.node if node.output[0] in reader.input]
        if node.op_type not in (*MOVES_ONLY, "Concat") or [one.op_type for one in readers] != ["QuantizeLinear"]:
            continue
        grid = readers[0].input[1:]
        for number, name in enumerate(node.input[: None if node.op_type == "Concat" else 1]):
            made = f"{node.name}.{number}"
            integers, values = f"{made}.int", f"{made}.rounded"
            pair = [
                helper.make_node("QuantizeLinear", [name, *grid], [integers], f"{made}.quantize"),
                helper.make_node("DequantizeLinear", [integers, *grid], [values], f"{made}.dequantize"),
            ]
            for one in pair:
                graph.node.insert(list(graph.node).index(node), one)
            node.input[number] = values


def _pack(model: onnx.ModelProto) -> None:
    """Store int8 weights in 4 or 2 bits where these hold them, and cast them back.

    Onnxruntime folds the Cast when it loads the file and fuses the layer as any int8 one. Without it, a layer of int4 is
    computed in float, and a file with one of int2 does not load (1.31.1). The opset becomes the one that has the type;
    what the graph's other operators compute is the same in it.
    """
    weights = {value.name: value for value in model.graph.initializer if value.data_type == onnx.TensorProto.INT8}
    for node in [node for node in model.graph.node if node.input and node.input[0] in weights]:
        name = node.input[0]
        integers = numpy_helper.to_array(weights[name])
        small = [kind for limit, kind in _SMALL_TYPES.items() if np.abs(integers).max() <= limit]
        if not small:
            continue
        kind, opset = small[0]
        dtype = helper.tensor_dtype_to_np_dtype(onnx.TensorProto.DataType.Value(kind))
        weights[name].CopyFrom(numpy_helper.from_array(integers.astype(dtype), f"{name}.{kind.lower()}"))
        cast = helper.make_node("Cast", [weights[name].name], [name], f"{name}.unpack", to=onnx.TensorProto.INT8)
        model.graph.node.insert(list(model.graph.node).index(node), cast)
        (imported,) = model.opset_import
        imported.version = max(imported.version, opset)
    model.ir_version = max(model.ir_version, helper.find_min_ir_version_for(model.opset_import))


def _integers(
    weight: NDArray[np.float32], bias: NDArray[np.float32], input_scale: NDArray[np.float32], limit: int
) -> list[tuple[NDArray[np.generic], NDArray[np.float32]]]:
    """Weight [channels, ...] as int8 and bias [channels] as int32, each with a scale a channel, float32.

    The scale of a bias is exactly that of the products it is added to. A channel of next to no weights takes the scale that
    its bias needs to be an int32.
    """
    rows = weight.reshape(len(weight), -1)
    grid = np.abs(rows).max(1) / limit
    scale = np.maximum(grid, np.abs(bias) / (input_scale * _LARGEST_BIAS)).astype(np.float32)
    scale[scale == 0] = 1  # of a channel that is 0 throughout
    integers = np.round(rows / scale[:, None])
    off = np.abs(integers * scale[:, None] - rows).max(1) > 1e-3 * scale
    if off[scale == grid].any():
        raise ValueError(f"its weights do not lie on a grid of {limit} steps on each side of 0")
    products = scale * input_scale
    integers = integers.astype(np.int8).reshape(weight.shape)
    return [(integers, scale), (np.round(bias / products).astype(np.int32), products)]


def _remove_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    for initializer in [initializer for initializer in graph.initializer if initializer.name not in used]:
        graph.initializer.remove(initializer)
