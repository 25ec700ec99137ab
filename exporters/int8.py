"""Static int8 quantization of a float32 graph, as QDQ that onnxruntime fuses, portable between CPUs.

Activations are uint8, weights int8 by channel in the reduced 7-bit range: CPUs that add two u8 x s8 products in 16 bits
(AVX2 and AVX-512 without VNNI) would saturate with 8-bit weights and lose accuracy without a word.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

from exporters.float32 import PixelScale

CALIBRATION_BATCH = 64  # samples; onnxruntime holds the activations of one batch at a time


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, samples: NDArray[np.float32]) -> None:
        self._batches: Iterator[NDArray[np.float32]] = iter(
            np.split(samples, range(CALIBRATION_BATCH, len(samples), CALIBRATION_BATCH))
        )
        self._name = name

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def quantize(
    graph: onnx.ModelProto, samples: NDArray[np.float32], pixels: PixelScale | None, shape: tuple[int, int, int] | None
) -> onnx.ModelProto:
    """`graph`, of one float32 input, quantized with the ranges that `samples` [n, ...] of that input give.

    With `pixels` and `shape` [C, H, W] the input becomes `image`, uint8: the first quantized tensor is the pixels
    themselves. Outputs stay float32, as the last layer computes them.
    """
    name = graph.graph.input[0].name
    overrides = {}
    if pixels is not None:
        scale, zero_point = np.array(pixels.scale, np.float32), np.array(pixels.mean, np.uint8)
        overrides = {name: [{"quant_type": QuantType.QUInt8, "scale": scale, "zero_point": zero_point}]}
    inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True)
    logging.getLogger().addFilter(_not_about_preprocessing)
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_static(
                inferred,
                str(path),
                _Reader(name, samples),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                # The second: pixels that are reshaped or pooled before any layer computes are integers as well.
                extra_options={"TensorQuantOverrides": overrides, "ForceQuantizeNoInputCheck": True},
            )
            quantized = onnx.load(path)
    finally:
        logging.getLogger().removeFilter(_not_about_preprocessing)
    if pixels is not None and shape is not None:
        _take_pixels(quantized, shape)
    _leave_output_in_float(quantized)
    quantized.producer_name, quantized.producer_version = "kdedge", ""
    onnx.checker.check_model(quantized, full_check=True)
    return quantized


def _not_about_preprocessing(record: logging.LogRecord) -> bool:
    """onnxruntime advises a pre-processing whose work is done here already: folding and shapes."""
    return "pre-processing" not in record.getMessage()


def _take_pixels(model: onnx.ModelProto, shape: tuple[int, int, int]) -> None:
    """Drop the first QuantizeLinear: with its own scale and zero point the pixels are what it would give."""
    graph = model.graph
    first = next(
        node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] == graph.input[0].name
    )
    for node in graph.node:
        node.input[:] = ["image" if name == first.output[0] else name for name in node.input]
    graph.node.remove(first)
    graph.input[0].CopyFrom(helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, ["batch", *shape]))


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
    used = {name for node in graph.node for name in node.input}
    for initializer in [initializer for initializer in graph.initializer if initializer.name not in used]:
        graph.initializer.remove(initializer)
    for info in [info for info in graph.value_info if info.name in (inner, quantizing.output[0])]:
        graph.value_info.remove(info)
