"""Accuracy of exported files on a device, with confidence intervals.

What is measured is the deployment: teachers and groups in one file as the files they are, and a group apart as its members'
files chained with the head's file.
"""

from __future__ import annotations

import io
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, PrivateAttr

from kdedge import devices
from kdedge.errors import DeviceError, RunError
from kdedge.manifest import ExportedFile, Manifest, Precision, ValidationRow, check_file, read_manifest
from kdedge.statistics import wilson
from kdedge.store import sha256, write_bytes

BATCH = 50  # fits the caches of small CPUs: faster than 1 and than 250


@dataclass(frozen=True)
class Graph:
    """Files that together turn an image into logits: one file, or members whose dense vectors are joined for a head."""

    network: str
    role: str  # the role of the file that gives the logits
    precision: Precision
    members: tuple[ExportedFile, ...]
    head: ExportedFile | None = None

    @property
    def name(self) -> str:
        """What identifies it within an export."""
        return f"{self.network} {self.role} {self.precision}"


class Known(dict[tuple[str, ...], devices.GraphAnswer]):
    """What devices said, by the hashes of images and labels, the device, and the hashes of a graph's files.

    The runs of a recipe share their teacher: it is measured once for all of them.
    """


class Validation(BaseModel):
    """validation.json. What was said of each image is not part of the file: the gate and `save_predictions` use it."""

    device: dict[str, Any]
    rows: list[ValidationRow]

    _right: dict[tuple[str, str, str], NDArray[np.bool_]] = PrivateAttr(default_factory=dict)
    _predictions: dict[str, NDArray[np.int32]] = PrivateAttr(default_factory=dict)

    def predictions(self, network: str, role: str, precision: str) -> NDArray[np.int32]:
        """The class that a graph gave each image, int32 [n]."""
        return self._predictions[f"{network} {role} {precision}"]

    def right(self, network: str, role: str, precision: str) -> NDArray[np.bool_]:
        """Which images a graph got right, bool [n]; of no image when it was not measured."""
        return self._right.get((network, role, precision), np.zeros(0, np.bool_))


def graphs(manifest: Manifest) -> list[Graph]:
    """Every way in which the exported files can be deployed as a classifier, in the order of the manifest.

    Raises RunError when there is no file, a member without a head, a head without members, or a file that is twice.
    """
    if not manifest.files:
        raise RunError("manifest: the export has no files. Export again.")
    members: dict[tuple[str, str], dict[int, ExportedFile]] = defaultdict(dict)
    for file in manifest.files:
        if file.role == "member":
            network, _, number = file.network.rpartition(".")
            if not network or not re.fullmatch("[0-9]{1,4}", number):
                raise RunError(
                    f"manifest: {file.path}: expected a member's name like 'students.0', given {file.network!r}"
                )
            members[network, file.precision][int(number)] = file
    found = []
    for file in manifest.files:
        if file.role == "head":
            chain = members.pop((file.network, file.precision), {})
            if not chain or sorted(chain) != list(range(len(chain))):
                raise RunError(
                    f"manifest: {file.path}: its members are {sorted(chain)}, expected 0, 1, ... Export again."
                )
            parts = tuple(chain[number] for number in range(len(chain)))
            found.append(Graph(file.network, file.role, file.precision, parts, file))
        elif file.role != "member":
            found.append(Graph(file.network, file.role, file.precision, (file,)))
    for (network, precision), chain in members.items():
        raise RunError(f"manifest: {len(chain)} members of {network!r} in {precision} have no head. Export again.")
    files = Counter((file.network, file.role, file.precision) for file in manifest.files)
    for (network, role, precision), count in files.items():
        if count > 1:
            raise RunError(f"manifest: {count} files are {network} {role} {precision}, expected one. Export again.")
    return found


def measure(
    export: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.integer[Any]],
    *,
    split: str,
    device: str = "cpu",
    threads: int = 2,
    precisions: Container[str] = get_args(Precision),
    known: Known | None = None,
) -> Validation:
    """Accuracy of every graph in `precisions` of the export folder on `device`: images uint8 [n, C, H, W], labels integer [n].

    What is in `known` is not measured again, and what is measured is put there. Raises RunError when a file is not the one
    of the manifest, DeviceError when the device cannot do it.
    """
    wanted = [graph for graph in graphs(read_manifest(export)) if graph.precision in precisions]
    known = Known() if known is None else known
    files = {job_path(file): check_file(export, file) for graph in wanted for file in graph_files(graph)}
    with tempfile.TemporaryDirectory(prefix="kdedge-validate-") as folder:
        arrays = {
            "images": put_array(Path(folder) / "images.npy", images, files),
            "labels": put_array(Path(folder) / "labels.npy", labels, files),
        }
        on = *(array["sha256"] for array in arrays.values()), device
        keys = [(*on, *(file.sha256 for file in graph_files(graph))) for graph in wanted]
        asked = {key: graph for key, graph in zip(keys, wanted, strict=True) if key not in known}
        named = [*map(job_graph, asked.values())]
        job = {"task": "accuracy", "threads": threads, "batch": BATCH, "graphs": named, **arrays}
        answer = devices.ask(device, job, files, devices.AccuracyAnswer)
    if [graph.name for graph in answer.graphs] != [graph.name for graph in asked.values()]:
        raise DeviceError(f"{device}: the runner answered for other files than it was asked for")
    known |= zip(asked, answer.graphs, strict=True)
    validation = Validation(device=answer.device, rows=[])
    for key, graph in zip(keys, wanted, strict=True):
        said = known[key]
        right = _right(f"{device}: {graph.name}", said, labels)
        n, correct = len(right), int(right.sum())
        low, high = wilson(correct, n)
        validation.rows.append(
            ValidationRow(
                network=graph.network,
                role=graph.role,
                precision=graph.precision,
                cpu_class=str(answer.device.get("cpu_class", "unknown")),
                split=split,
                n=n,
                correct=correct,
                accuracy=round(100 * correct / n, 4),
                accuracy_ci95=(round(low, 4), round(high, 4)),
            )
        )
        validation._right[graph.network, graph.role, graph.precision] = right
        validation._predictions[graph.name] = np.asarray(said.predictions, np.int32)
    return validation


def save_predictions(path: Path, validation: Validation, labels: NDArray[np.integer[Any]]) -> None:
    """Write what each graph said of each image, int32 [n] by its name, and the `labels`, as one npz file."""
    content = io.BytesIO()
    np.savez_compressed(content, labels=labels.astype(np.int32), **validation._predictions)  # type: ignore[arg-type]
    write_bytes(path, content.getvalue())


def _right(name: str, said: devices.GraphAnswer, labels: NDArray[np.integer[Any]]) -> NDArray[np.bool_]:
    """Which images are right, bool [n]. Raises DeviceError when the answer contradicts itself."""
    if len(said.predictions) != len(labels):
        raise DeviceError(f"{name}: {len(said.predictions)} predictions for {len(labels)} images")
    right: NDArray[np.bool_] = np.asarray(said.predictions) == labels
    if (said.n, said.correct) != (len(labels), right.sum()):
        raise DeviceError(f"{name}: counted {said.correct} of {said.n}, its predictions give {right.sum()}")
    return right


def graph_files(graph: Graph) -> tuple[ExportedFile, ...]:
    """The files of a graph, members first."""
    return (*graph.members, graph.head) if graph.head else graph.members


def job_graph(graph: Graph) -> dict[str, Any]:
    """A graph as a job names it."""
    return {
        "name": graph.name,
        "members": [job_file(file) for file in graph.members],
        "head": job_file(graph.head) if graph.head else None,
    }


def job_path(file: ExportedFile) -> str:
    """Where an exported file lies in a job's folder: apart from the job's own files, whatever its name."""
    return f"export/{file.path}"


def job_file(file: ExportedFile) -> dict[str, str]:
    """An exported file as a job names it; the hash is the manifest's."""
    return {"path": job_path(file), "sha256": file.sha256}


def put_array(path: Path, array: NDArray[Any], files: dict[str, Path]) -> dict[str, str]:
    """Write an array for a job, add it to the job's files, and give the words by which the job names it."""
    np.save(path, array)
    files[path.name] = path
    return {"path": path.name, "sha256": sha256(path)}
