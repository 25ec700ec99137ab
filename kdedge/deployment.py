"""The story of `export`: run -> ONNX files in fp32 and int8 -> measured -> gate -> manifest."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from exporters.calibration import Calibration
from exporters.float32 import (
    OPSET,
    ExportError,
    fold_batch_norm,
    from_pixels,
    to_graph,
)
from exporters.int8 import FORMS, quantize, quantize_trained
from exporters.parity import check, check_trained
from kdedge import store
from kdedge.audit import audit, tensors, weight_bits
from kdedge.data.batches import pixel_scale
from kdedge.data.catalog import DatasetInfo
from kdedge.data.load import load_recorded
from kdedge.errors import GateError, RunError
from kdedge.gates import judge, least_drop, lost
from kdedge.manifest import DataRecord, ExportedFile, Manifest, Place, Precision, Repair
from kdedge.models.network import count_parameters
from kdedge.pieces import Piece, finished, pieces_of, roles
from kdedge.progress import Quiet
from kdedge.quantize.layers import rounded, weight_limits, with_rounded_biases
from kdedge.recipe_reader import resolved_recipe
from kdedge.repair import Repairer
from kdedge.store import Run
from kdedge.validate import Known, measure

CHECKED_IMAGES = 250  # validation images on which a float32 file is held against its network in torch
COMPARED_IMAGES = 2000  # those on which an int8 file is held against its simulation in torch


def export(
    run: Run | Path | str,
    *,
    int8: bool = True,
    repair: bool = False,
    data_dir: Path | None = None,
    progress: Quiet | None = None,
    known: Known | None = None,
) -> Manifest:
    """Write the run's teacher, members, heads and groups as a whole to RUN/export, then measure what was written.

    With `repair`, what passes the gate in no form of int8 is written with the fewest layers in float that let it pass.
    Calls that are given the same `known`, empty at first, measure a file that their runs share once. Raises GateError when an
    int8 file lost more accuracy on the validation split than the recipe allows, on a CPU class that it is for: the files
    and the manifest are left, and say so. Raises RunError when the run is unfinished or damaged.
    """
    progress = progress or Quiet()
    run = run if isinstance(run, Run) else store.open_run(Path(run))
    recipe = resolved_recipe(run.recipe, str(run.path / "run.json"))
    networks = [(name, role, finished(run, recipe, name)) for name, role in roles(recipe)]
    dataset = load_recorded(run.data, data_dir)
    calibration = torch.from_numpy(dataset.train_images[run.data["calibration"]])
    validation = dataset.train_images[run.data["validation"]], dataset.train_labels[run.data["validation"]]
    compared = torch.from_numpy(validation[0][:COMPARED_IMAGES])
    with store.lock(run.path), store.new_folder(run.path / "export") as folder:
        manifest = Manifest(
            recipe=recipe.name,
            quick=run.quick,
            stages={stage.name: stage.key for stage in run.stages},
            opset=OPSET,
            data=DataRecord.model_validate(run.data),
            calibration=run.data["calibration"] if int8 else [],
            calibrated_by=recipe.deploy.int8.calibration,
            validation=run.data["validation"],
            versions={**run.versions, **{name: version(name) for name in ("onnx", "onnxscript", "onnxruntime")}},
            files=[],
        )
        pieces = [piece for name, role, network in networks for piece in pieces_of(name, role, network, recipe)]
        write = partial(_write, folder, recipe.deploy.int8.calibration, calibration, compared, dataset.info)
        for done, piece in enumerate(pieces):
            progress.update("export", done, len(pieces), piece.file_name("fp32"))
            for precision in get_args(Precision)[: 1 + int8]:
                manifest.files.append(write(piece, precision))
        progress.update("export", len(pieces), len(pieces), f"{len(manifest.files)} files")
        progress.finish()
        _note_training(manifest, len(compared), progress)
        progress.note(f"measuring {len(manifest.files)} files on {len(validation[1]):,} validation images")
        store.write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
        if int8:
            mend = Repairer(pieces, calibration, dataset.info, write) if repair else None
            in_form = partial(_in_form, pieces, write)
            settings = recipe.deploy, recipe.bench
            judge(folder, manifest, *validation, *settings, in_form, repair=mend, known=known, progress=progress)
            _record_float_nodes(folder, manifest.files)
        else:
            manifest.accuracy = measure(folder, *validation, split="validation", known=known).rows
        store.write_json(folder / "manifest.json", manifest.model_dump(mode="json"))
        store.drop_measurements(run.path)
    hold_the_gates(manifest, run.path / "export", repair)
    return manifest


def hold_the_gates(manifest: Manifest, export: Path, repair: bool) -> None:
    """Raise GateError with every verdict on what passed in no form, and with what helps."""
    if not (refused := manifest.refused):
        return
    trained_quantized = {file.network for file in manifest.files if file.agreement_with_torch is not None}
    advice = ["ship the fp32 files"]
    if too_much := [verdict for verdict in refused if lost(verdict)]:
        advice.append("train longer and export again")
        told = {verdict.network for verdict in too_much if least_drop(verdict.n) <= verdict.max_drop_points}
        if not repair and told - trained_quantized:
            advice.append("export again with --repair")
    if any(verdict.drop_points is None for verdict in refused):
        advice.append("change deploy.cpu_classes: `kdedge devices` says which of them can be run here, and how")
    lines = [f"The int8 export {'lost too much accuracy' if too_much else 'could not be validated'}:"]
    lines += [f"  {verdict.reason}" for verdict in refused]
    lines.append(f"The files are in {export}; {', or '.join(advice)}.")
    raise GateError("\n".join(lines))


def _note_training(manifest: Manifest, images: int, progress: Quiet) -> None:
    """Say how near the files of what was trained quantized are to its simulation in torch, with biases in integers, and what
    fewer bits than 8 are good for."""
    for file in manifest.files:
        if file.agreement_with_torch is not None:
            said = (
                f"the class that its simulation in torch gives on {file.agreement_with_torch:.2f}% of {images:,} images"
            )
            progress.note(f"{file.path}: {said}, logits within {file.difference_to_torch:.3g}")
    for bits in sorted({file.weight_bits for file in manifest.files if file.weight_bits and file.weight_bits < 8}):
        why = "onnxruntime makes them int8 when it loads the file"
        progress.note(f"weights of {bits} bits make a file smaller, not faster: {why}")


def _in_form(
    pieces: list[Piece],
    write: Callable[[Piece, Precision], ExportedFile],
    form: Precision,
    places: Collection[Place],
) -> list[ExportedFile]:
    """Write what is at some places in another form of int8. What was trained quantized has one."""
    return [write(one, form) for one in pieces if one.place in places and one.bits is None]


def _write(
    folder: Path,
    method: Calibration,
    images: Tensor,
    compared: Tensor,
    info: DatasetInfo,
    piece: Piece,
    precision: Precision,
    repair: Repair | None = None,
) -> ExportedFile:
    """Write a piece in fp32, or in a form of int8: calibrated on `images`, uint8 [n, C, H, W], by `method` or as its `repair`
    says, or, if it was trained quantized, with its own scales.

    On the images `compared`, fp32 is held against the network, and what was trained quantized against its simulation.
    """
    pixels = piece.pixels(info)
    given, inputs = piece.takes(compared[:CHECKED_IMAGES], info)
    path, example, measured = folder / piece.file_name(precision), inputs[:2], dict[str, float | None]()
    try:
        if precision == "fp32":
            graph = piece.graph(example)
            whole = from_pixels(graph, pixels, info.shape) if pixels else graph
        elif piece.bits is None:
            made = repair or Repair(form=precision, calibrated_by=method, in_float=[])
            graph, found = piece.calibrated(images, info, made.calibrated_by)
            whole = quantize(graph, found, pixels, info.shape, FORMS[made.form], made.in_float)
        else:
            # Not `piece.graph`: the ranges of what its layers take are constants of this graph, not weights.
            graph = to_graph(rounded(piece.module), example, piece.input_name, piece.gives)
            whole = quantize_trained(graph, weight_limits(piece.module), pixels, info.shape)
        store.write_bytes(path, whole.SerializeToString(deterministic=True))
        if precision == "fp32":
            measured = {"difference_to_torch": check(path, piece.in_float, given.numpy(), inputs)}
        elif piece.bits is not None:
            measured = _compared(path, piece, compared, info)
    except ExportError as error:
        raise RunError(f"{piece.network} ({piece.role}) cannot be exported: {error}") from None
    return ExportedFile(
        network=piece.network,
        role=piece.role,
        precision=precision,
        path=path.name,
        sha256=store.sha256(path),
        bytes=path.stat().st_size,
        parameters=count_parameters(piece.module),
        weight_bits=weight_bits(whole.graph),
        opset=whole.opset_import[0].version,
        inputs=tensors(whole.graph.input),
        outputs=tensors(whole.graph.output),
        repair=repair,
        **measured,
    )


def _compared(path: Path, piece: Piece, images: Tensor, info: DatasetInfo) -> dict[str, float | None]:
    """How near the int8 file at `path` is to the network that was trained quantized, on `images`."""
    given, inputs = piece.takes(images, info)
    of_classes = piece.gives == "logits"
    simulated = with_rounded_biases(fold_batch_norm(rounded(piece.module)), pixel_scale(info))
    difference, agreement = check_trained(path, simulated, given.numpy(), inputs, of_classes=of_classes)
    return {"difference_to_torch": difference, "agreement_with_torch": agreement}


def _record_float_nodes(folder: Path, files: list[ExportedFile]) -> None:
    """Note of each int8 file which nodes onnxruntime computes in float."""
    quantized = [file for file in files if file.precision != "fp32"]
    for file, float_nodes in zip(quantized, audit(folder, quantized)[1], strict=True):
        file.float_nodes = float_nodes


def rows_to_print(manifest: Manifest) -> tuple[list[str], list[list[str]]]:
    """The files of an export as a table: size, accuracy on the validation split, and what stays in float."""
    accuracy = {(row.network, row.role, row.precision): row for row in manifest.accuracy}
    rows = []
    for file in manifest.files:
        measured = accuracy.get((file.network, file.role, file.precision))
        rows.append(
            [
                file.path,
                f"{file.parameters:,}",
                "" if file.weight_bits is None else str(file.weight_bits),
                f"{file.bytes / 1000:,.0f}",
                f"{measured.accuracy:.2f}" if measured else "",
                "" if file.float_nodes is None else str(len(file.float_nodes)),
            ]
        )
    return ["file", "parameters", "weight bits", "kB", "validation %", "float nodes"], rows
