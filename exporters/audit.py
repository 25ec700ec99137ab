"""Which nodes of an int8 file onnxruntime still computes in float."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import onnxruntime

_CHANGES = ("QuantizeLinear", "DequantizeLinear")  # the borders between the two worlds


def float_nodes(path: Path) -> list[str]:
    """`name (operator)` of every node of the file at `path` that stays in float after onnxruntime has fused it here.

    The graph is fused as on this CPU, at the extended level: the answer may differ on another CPU class.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(Path(folder) / "fused.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    integer = {initializer.name for initializer in graph.initializer if initializer.data_type != onnx.TensorProto.FLOAT}
    integer |= {value.name for value in graph.input if value.type.tensor_type.elem_type != onnx.TensorProto.FLOAT}
    in_float = []
    for node in graph.node:
        fused = node.op_type.startswith("QLinear") or node.op_type == "QGemm"
        # QGemm without an output zero point (input 8) gives float.
        gives_integer = node.op_type == "QuantizeLinear" or (
            fused and not (node.op_type == "QGemm" and len(node.input) < 9)
        )
        if not fused and node.op_type not in _CHANGES:
            gives_integer = node.input[0] in integer
            if not gives_integer:
                in_float.append(f"{node.name} ({node.op_type})")
        if gives_integer:
            integer.update(node.output)
    return in_float
