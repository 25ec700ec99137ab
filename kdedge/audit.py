"""What an exported file is, before anything runs it, and which of its nodes onnxruntime then computes in float.

A graph that stands alone needs nothing that the manifest's hash does not cover: no tensor in another file, and no
operator that somebody would have to bring a library for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdedge import devices
from kdedge.errors import DeviceError, RunError
from kdedge.manifest import ExportedFile, TensorInfo, check_file
from kdedge.validate import job_file, job_path
from kdedge.wording import shorten

if TYPE_CHECKING:
    import onnx

_ONNX = ("", "ai.onnx")  # two names of one domain: ONNX's own operators
_CHANGES = ("QuantizeLinear", "DequantizeLinear")  # the borders between integers and floats


def check_graph(path: Path, file: ExportedFile, opset: int) -> None:
    """Raise RunError unless `path` is an ONNX graph that stands alone, with this opset and the inputs and outputs of `file`.

    Nothing is run, and no other file is opened.
    """
    import onnx

    try:
        model = onnx.load_model_from_string(path.read_bytes())
        problem = _not_alone(model) or _not_as_said(model, file, opset)
    except Exception as error:  # of protobuf, of onnx for unknown types, or of Python for names that are no UTF-8
        raise RunError(f"{path} is no ONNX file, or a damaged one: {shorten(' '.join(str(error).split()))}") from None
    if problem:
        raise RunError(f"{path}: {problem}. Export again.")


def _not_alone(model: onnx.ModelProto) -> str | None:
    import onnx

    for part in _messages(model):
        if isinstance(part, onnx.TensorProto) and (part.external_data or part.data_location == part.EXTERNAL):
            return f"its tensor {shorten(repr(part.name))} is in another file, expected one file that holds all of them"
        if isinstance(part, onnx.NodeProto) and part.domain not in _ONNX:
            operator = shorten(repr(f"{part.domain}.{part.op_type}"))
            return f"its operator {operator} is not one of ONNX's own, so that the file does not run everywhere"
    return None


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages in it: nodes and tensors in subgraphs, functions and attributes as well."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)


def _not_as_said(model: onnx.ModelProto, file: ExportedFile, opset: int) -> str | None:
    versions = [entry.version for entry in model.opset_import if entry.domain in _ONNX]
    if versions != [opset]:
        return f"expected opset {opset}, as the manifest says, found {', '.join(map(str, versions)) or 'none'}"
    for kind, found, said in (
        ("inputs", tensors(model.graph.input), file.inputs),
        ("outputs", tensors(model.graph.output), file.outputs),
    ):
        if found != said:
            return f"expected the {kind} {_told(said)}, as the manifest says, found {_told(found)}"
    return None


def _told(found: list[TensorInfo]) -> str:
    return shorten(", ".join(f"{one.name} {one.dtype} {one.shape}" for one in found)) or "none"


def tensors(values: Iterable[onnx.ValueInfoProto]) -> list[TensorInfo]:
    """Inputs or outputs of a graph. Raises KeyError for a type that is no tensor's."""
    import onnx

    return [
        TensorInfo(
            name=value.name,
            dtype=onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            shape=[axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim],
        )
        for value in values
    ]


def weight_bits(graph: onnx.GraphProto) -> int:
    """The fewest bits in which the weights of a layer are stored: 32 of floats, 8, 4 or 2 of integers."""
    import onnx

    types = {onnx.TensorProto.DataType.Name(value.data_type) for value in graph.initializer if len(value.dims) > 1}
    return min((int(name.removeprefix("U").removeprefix("INT")) for name in types if "INT" in name), default=32)


def audit(export: Path, files: list[ExportedFile], *, device: str = "cpu") -> tuple[dict[str, Any], list[list[str]]]:
    """The device, and for each file `name (operator)` of every node that stays in float after onnxruntime has fused it there.

    The answer may differ between CPU classes. Raises RunError when a file is not the one of the manifest, DeviceError
    when onnxruntime cannot load it.
    """
    sent = {job_path(file): check_file(export, file) for file in files}
    job = {"task": "fuse", "files": [{"name": file.path, **job_file(file)} for file in files]}
    answer = devices.ask(device, job, sent, devices.FuseAnswer)
    if [file.name for file in answer.files] != [file.path for file in files]:
        raise DeviceError(f"{device}: the runner answered for other files than it was asked for")
    return answer.device, [_float_nodes(_graph(f"{device}: {file.name}", file.graph)) for file in answer.files]


def _graph(name: str, digits: str) -> onnx.GraphProto:
    import onnx

    try:
        return onnx.load_model_from_string(bytes.fromhex(digits)).graph
    except Exception as error:  # of protobuf, which has its own
        raise DeviceError(f"{name}: the runner's answer is no graph: {error}") from None


def _float_nodes(graph: onnx.GraphProto) -> list[str]:
    import onnx
    from onnx import helper

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
            gives_integer = not integer.isdisjoint(node.input[:1])
            if node.op_type == "Cast":
                gives_integer = helper.get_node_attr_value(node, "to") != onnx.TensorProto.FLOAT
            elif not gives_integer:
                in_float.append(f"{node.name} ({node.op_type})")
        if gives_integer:
            integer.update(node.output)
    return in_float
