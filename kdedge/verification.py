"""The story of `verify`: whether an export folder, wherever it was copied to, is what its manifest says.

The folder is enough; only the accuracy needs the images as well. The hashes of all files come first, then what each file
says of itself, and only then onnxruntime loads and runs them, in processes of its own. A step that finds something wrong
tells all that it found, and is the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from kdedge.audit import audit, check_graph
from kdedge.data.load import load_recorded
from kdedge.errors import DataError, DeviceError, PackageError, RunError
from kdedge.manifest import ExportedFile, Manifest, ValidationRow, check_file, read_manifest
from kdedge.store import Run
from kdedge.validate import graphs, measure
from kdedge.wording import shorten

OTHER_CPU = 1000  # 1 image in so many may be right on one CPU and wrong on another, which adds in another order

_Images = tuple[NDArray[np.uint8], NDArray[np.int64]]


class VerifiedFile(BaseModel):
    """One file that is what the manifest says. Accuracies are in percent, of the network that the file completes."""

    path: str
    network: str
    role: str
    precision: str
    bytes: int
    float_nodes: list[str] | None  # of int8: what onnxruntime computes in float here
    recorded_accuracy: float | None  # as the manifest has it; null for a member
    accuracy: float | None  # here, on the same images; null where it was not measured


class Verification(BaseModel):
    """What `verify` says of an export folder in which nothing is wrong."""

    folder: str
    recipe: str
    opset: int
    device: dict[str, Any]
    files: list[VerifiedFile]
    notes: list[str]  # what was checked; what was not, and why


def verify(
    folder: Run | Path | str, *, data_dir: Path | None = None, progress: Callable[[str], None] | None = None
) -> Verification:
    """Check an export folder, or that of a run, against its manifest; `progress` gets a line before each slow step.

    Raises PackageError with every problem that the first failing step found, and DataError when the images in
    `data_dir` are others; without `data_dir`, images that are not at hand are a note.
    """
    given = folder.path if isinstance(folder, Run) else Path(folder)
    export = given / "export" if (given / "run.json").is_file() else given
    try:
        return _verify(export, data_dir, progress or (lambda line: None))
    except (RunError, DeviceError) as error:
        raise PackageError([str(error)]) from None


def _verify(folder: Path, data_dir: Path | None, say: Callable[[str], None]) -> Verification:
    manifest = read_manifest(folder)
    graphs(manifest)
    _each(manifest, lambda file: check_file(folder, file))
    _each(manifest, lambda file: check_graph(folder / file.path, file, file.opset or manifest.opset))

    say(f"loading {len(manifest.files)} files")
    device, float_nodes = audit(folder, manifest.files)
    images = _images(manifest, data_dir)
    measured: list[ValidationRow] = []
    if not isinstance(images, str):
        say(f"accuracy on {len(images[1]):,} validation images")
        measured = measure(folder, *images, split="validation").rows
    problems = [
        *_more_in_float(folder, manifest, device, float_nodes),
        *(f"{folder}: its export was refused: {verdict.reason}" for verdict in manifest.refused),
        *_never_judged(manifest),
        *_other_accuracies(manifest, measured),
    ]
    if problems:
        raise PackageError(problems)

    recorded, here = _by_place(manifest.accuracy), _by_place(measured)
    return Verification(
        folder=str(folder),
        recipe=manifest.recipe,
        opset=manifest.opset,
        device=device,
        files=[
            VerifiedFile(
                **file.model_dump(include={"path", "network", "role", "precision", "bytes"}),
                float_nodes=None if file.precision == "fp32" else nodes,
                recorded_accuracy=recorded[_place(file)].accuracy if _place(file) in recorded else None,
                accuracy=here[_place(file)].accuracy if _place(file) in here else None,
            )
            for file, nodes in zip(manifest.files, float_nodes, strict=True)
        ],
        notes=_notes(folder, manifest, images),
    )


def _each(manifest: Manifest, check: Callable[[ExportedFile], object]) -> None:
    """Check every file of the manifest. Raises PackageError with all that is wrong."""
    problems = []
    for file in manifest.files:
        try:
            check(file)
        except RunError as error:
            problems.append(str(error))
    if problems:
        raise PackageError(problems)


def _images(manifest: Manifest, data_dir: Path | None) -> _Images | str:
    """Validation images and their labels, uint8 [n, C, H, W] and int64 [n], or in a sentence why there are none."""
    numbers = manifest.validation
    if manifest.data is None or not numbers:
        return "The manifest does not say on which images it was measured before. Export again with this kdedge."
    try:
        dataset = load_recorded(manifest.data.model_dump(), data_dir, download=False)
    except DataError as error:
        if data_dir is not None:
            raise
        return str(error)
    size = len(dataset.train_labels)
    if min(numbers) < 0 or max(numbers) >= size:
        raise RunError(
            f"manifest: validation: expected numbers from 0 to {size - 1}, given {min(numbers)} to {max(numbers)}"
        )
    return dataset.train_images[numbers], dataset.train_labels[numbers]


def _more_in_float(
    folder: Path, manifest: Manifest, device: dict[str, Any], float_nodes: list[list[str]]
) -> Iterator[str]:
    """Each int8 file of which onnxruntime computes more in float here than where it was exported."""
    for file, here in zip(manifest.files, float_nodes, strict=True):
        before = file.float_nodes or []
        if file.precision != "fp32" and not set(here) <= set(before):
            yield (
                f"{folder / file.path}: expected {_some(before)} in float, as the manifest says, found {_some(here)} "
                f"with onnxruntime {device.get('onnxruntime')} on {device.get('cpu_class')}"
            )


def _never_judged(manifest: Manifest) -> Iterator[str]:
    """Each int8 graph that no gate let pass or refused."""
    judged = {(*verdict.place, verdict.precision) for verdict in manifest.gates}
    for graph in graphs(manifest):
        if graph.precision != "fp32" and (graph.network, graph.role, graph.precision) not in judged:
            yield f"manifest: {graph.name} was never held against float32 by a gate. Export again."


def _some(nodes: list[str]) -> str:
    return shorten(", ".join(nodes)) or "no node"


def _other_accuracies(manifest: Manifest, measured: list[ValidationRow]) -> Iterator[str]:
    """Each accuracy here that is not the one of the manifest."""
    recorded = _by_place(manifest.accuracy)
    for here in measured:
        before, name = recorded.get(_place(here)), " ".join(_place(here))
        if before is None or before.n != here.n:
            yield f"manifest: {name}: there is no accuracy on the {here.n:,} validation images. Export again."
            continue
        images = abs(before.correct - here.correct), abs(before.accuracy - here.accuracy) * here.n / 100
        if not all(other < _may_differ(here.n) + 0.5 for other in images):  # false for nan
            yield (
                f"{name}: {here.accuracy:.2f}% of {here.n:,} validation images are right on {here.cpu_class}, the "
                f"manifest says {before.accuracy:.2f}%, measured on {before.cpu_class}"
            )


def _may_differ(n: int) -> int:
    """Of n images, those on which another CPU, which rounds otherwise, may say something else."""
    return max(1, n // OTHER_CPU)


def _place(one: ExportedFile | ValidationRow) -> tuple[str, str, str]:
    return one.network, one.role, one.precision


def _by_place(rows: list[ValidationRow]) -> dict[tuple[str, str, str], ValidationRow]:
    return {_place(row): row for row in rows}


def _notes(folder: Path, manifest: Manifest, images: _Images | str) -> list[str]:
    opsets = " or ".join(map(str, sorted({file.opset or manifest.opset for file in manifest.files})))
    checked = f"SHA-256, opset {opsets}, inputs and outputs, and what stays in float"
    notes = [f"The {len(manifest.files)} files in {folder} are those of its manifest: {checked}."]
    if isinstance(images, str):
        notes.append(f"Their accuracy was not measured. {images}")
    else:
        n = len(images[1])
        notes.append(
            f"Their accuracy on {n:,} validation images is that of the manifest, but for {_may_differ(n)} at most."
        )
    if manifest.quick:
        notes.append("The export is of a --quick run: its accuracies mean nothing.")
    return notes


def rows_to_print(verification: Verification) -> tuple[list[str], list[list[str]]]:
    """The files as a table: size, what stays in float, and the accuracy in the manifest and here."""
    rows = [
        [
            file.path,
            f"{file.bytes / 1000:,.0f}",
            "" if file.float_nodes is None else str(len(file.float_nodes)),
            "" if file.recorded_accuracy is None else f"{file.recorded_accuracy:.2f}",
            "" if file.accuracy is None else f"{file.accuracy:.2f}",
        ]
        for file in verification.files
    ]
    return ["file", "kB", "float nodes", "manifest %", "here %"], rows
