"""A whole run in miniature, made of real files.

The class of an image is the brightest of its first ten pixels, and the networks read just those pixels, so every
prediction is known beforehand. Manifest and run.json belong to them.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kdedge.audit import audit
from kdedge.data.load import load
from kdedge.manifest import ExportedFile, GateResult, Manifest, TensorInfo
from kdedge.progress import Quiet
from kdedge.store import Run, StageRecord, sha256, write_json

PARAMETERS = 100  # told in the manifest; nothing here counts them
STAGE = StageRecord(name="fit teacher", network="teacher", key="0" * 64, folder="stages/fit-teacher-0000")


def labelled_images(n: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [n, 1, 28, 28] and labels 0, 1, ... 9, 0, ... as int64 [n]."""
    labels = np.arange(n) % 10
    images = np.zeros((n, 1, 28, 28), np.uint8)
    images[np.arange(n), 0, 0, labels] = 255
    return images, labels


def pixels(columns: list[int]) -> NDArray[np.float32]:
    """Weights [784, len(columns)] that hand on the given pixels; -1 stands for an output that is always 0."""
    weights = np.zeros((784, len(columns)), np.float32)
    for output, pixel in enumerate(columns):
        if pixel >= 0:
            weights[pixel, output] = 1
    return weights


def write_image_network(path: Path, weights: NDArray[np.float32], output: str = "logits") -> Path:
    """image uint8 [batch, 1, 28, 28] -> float32 [batch, outputs], a product with `weights` [784, outputs]."""
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=1),
        helper.make_node("Cast", ["flat"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["float", "weights"], [output], "product"),
    ]
    return _write(path, nodes, ("image", TensorProto.UINT8, ["batch", 1, 28, 28]), output, weights)


def write_head(path: Path, weights: NDArray[np.float32]) -> Path:
    """dense float32 [batch, width] -> logits float32 [batch, classes], a product with `weights`."""
    nodes = [helper.make_node("MatMul", ["dense", "weights"], ["logits"], "product")]
    return _write(path, nodes, ("dense", TensorProto.FLOAT, ["batch", weights.shape[0]]), "logits", weights)


def _write(
    path: Path, nodes: list[onnx.NodeProto], image: tuple[str, int, list[str | int]], output: str, weights: NDArray
) -> Path:
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info(*image)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


GATE = {"network": "teacher", "role": "teacher", "drop_points": 10.0, "upper95_points": 15.0, "max_drop_points": 20.0}
GATE |= {"passed": True, "only_fp32": 20, "only_int8": 0, "n": 200, "reason": ""}


def write_export(run: Path) -> Manifest:
    """An export of a teacher and two students with their head, in both precisions.

    fp32 is always right. The int8 teacher is wrong on class 9 (it says 0), the int8 merged network on classes 8 and 9;
    the int8 members and head are right, so that the chain can be told from the merged file.
    """
    export = run / "export"
    ten = list(range(10))
    files = []
    for precision, teacher, merged in (("fp32", ten, ten), ("int8", [*ten[:9], -1], [*ten[:8], -1, -1])):
        places = {
            ("teacher", "teacher"): write_image_network(export / f"teacher.{precision}.onnx", pixels(teacher)),
            ("students", "merged"): write_image_network(export / f"students.{precision}.onnx", pixels(merged)),
            ("students", "head"): write_head(export / f"head.{precision}.onnx", np.eye(10, dtype=np.float32)),
        }
        for member, columns in enumerate((ten[:5], ten[5:])):
            path = export / f"students.{member}.{precision}.onnx"
            places[f"students.{member}", "member"] = write_image_network(path, pixels(columns), "dense")
        files += [exported(path, *place, precision) for place, path in places.items()]
    judged = [("teacher", "teacher"), ("students", "merged"), ("students", "head")]
    gates = [GateResult.model_validate(GATE | {"network": network, "role": role}) for network, role in judged]
    manifest = Manifest(recipe="tiny", files=files, stages={STAGE.name: STAGE.key}, gates=gates)
    write_json(export / "manifest.json", manifest.model_dump(mode="json"))
    return manifest


def exported(path: Path, network: str, role: str, precision: str) -> ExportedFile:
    """The manifest's entry of a file that lies in the export folder."""
    image = TensorInfo(name="image", dtype="uint8", shape=["batch", 1, 28, 28])
    name, width = ("dense", 5) if role == "member" else ("logits", 10)
    return ExportedFile(
        network=network,
        role=role,
        precision=precision,
        path=path.name,
        sha256=sha256(path),
        bytes=path.stat().st_size,
        parameters=PARAMETERS,
        inputs=[TensorInfo(name="dense", dtype="float32", shape=["batch", 10]) if role == "head" else image],
        outputs=[TensorInfo(name=name, dtype="float32", shape=["batch", width])],
        float_nodes=["product (MatMul)"] if precision == "int8" else None,
    )


def float_nodes(path: Path) -> list[str]:
    """What onnxruntime computes in float of the file at `path`."""
    return audit(path.parent, [exported(path, "network", "teacher", "int8")])[1][0]


def write_data(folder: Path, n: int) -> Path:
    """A data folder with Fashion-MNIST's four files, of `n` labelled images in each split."""
    images, labels = labelled_images(n)
    target = folder / "fashion-mnist"
    target.mkdir(parents=True)
    for split in ("train", "t10k"):
        header = struct.pack(">4I", 0x803, n, 28, 28)
        (target / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (target / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2I", 0x801, n) + bytes(labels.tolist()))
    return folder


def recorded_data(fingerprint: str = "0" * 64) -> dict[str, Any]:
    """What run.json says of the data."""
    return {"name": "fashion-mnist", "fingerprint": fingerprint, "train": 0, "validation": [], "calibration": []}


def write_run(path: Path, data_dir: Path, *, quick: bool = False, rounds: int = 2, seconds: float = 0.02) -> Run:
    """run.json and export of a run that was distilled on the data in `data_dir`."""
    write_export(path)
    recipe = {"name": "tiny", "data": {"name": "fashion-mnist"}, "networks": {"teacher": {"model": "mlp-8"}}}
    run = Run(
        name="tiny",
        quick=quick,
        recipe=recipe | {"bench": {"threads": 1, "rounds": rounds, "seconds": seconds}},
        data=recorded_data(load("fashion-mnist", data_dir).fingerprint),
        stages=[STAGE],
        versions={},
        path=path,
    )
    run.write()
    return run


class Notes(Quiet):
    """What was noted."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)
