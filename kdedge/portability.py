"""The story of `validate`: the int8 files of a run on every CPU class, on this machine's own and on emulated ones.

Whatever a class says is held against the fp32 files and against the same int8 files on this machine. No times are taken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from kdedge import devices
from kdedge.data.load import load_recorded
from kdedge.devices import emulated
from kdedge.errors import DeviceError, RunError
from kdedge.manifest import INT8, ValidationRow, manifest_of
from kdedge.progress import Quiet
from kdedge.statistics import paired_drop
from kdedge.store import CPU_CLASSES, Run, lock, open_run, read_as, write_json
from kdedge.validate import Known, Validation, measure
from kdedge.variants import QUICK_IMAGES

IMAGES = 2000  # of the test split: a few minutes a class
NUMERICS = ("cpu", "cpu_class", "os", "python", "numpy", "onnxruntime")  # of a device: what its answers depend on


class ClassRow(BaseModel):
    """One int8 graph on one CPU class. Figures are in percent or points; null where it was not validated."""

    network: str
    role: str
    precision: str = "int8"
    cpu_class: str
    status: Literal["validated", "not validated"]
    reason: str | None = None  # why it was not
    emulated: bool | None = None
    qemu: dict[str, str] | None = None  # its version, and the CPU that it imitated
    n: int | None = None
    correct: int | None = None
    accuracy: float | None = None
    accuracy_ci95: tuple[float, float] | None = None  # Wilson
    drop_points: float | None = None  # from fp32, on the same images
    upper95_points: float | None = None  # upper end of the two-sided 95% interval of that
    agreement_fp32: float | None = None  # images that get the class that fp32 gives them, here
    agreement_native: float | None = None  # and that the same file gives them, here
    differing: int | None = None  # images that the same file gives another class here


class CpuClasses(BaseModel):
    """cpu_classes.json."""

    recipe: str
    quick: bool
    split: Literal["test"] = "test"
    n: int
    device: dict[str, Any]  # this machine
    files: dict[str, str]  # of the export, with their SHA-256
    fp32: list[ValidationRow]  # on this machine
    rows: list[ClassRow]


def validate(
    run: Run | Path | str,
    *,
    cpu_classes: Sequence[str] = ("all",),
    images: int | None = IMAGES,
    data_dir: Path | None = None,
    progress: Quiet | None = None,
    known: Known | None = None,
) -> CpuClasses:
    """Accuracy of the run's int8 files on each CPU class, on the first `images` test images; writes RUN/cpu_classes.json.

    With None on all of them. On a large network 2,000 take hours, emulated. Rows of other classes stay in the file where they are
    of the same files, images and machine.

    A class that cannot be run here, or on which it failed, has rows that say so: it is never taken for validated. Raises
    RunError, DataError, and DeviceError for a class that does not exist or when this machine fails.
    """
    wanted = list(devices.CPU_CLASSES) if "all" in cpu_classes else list(dict.fromkeys(cpu_classes))
    for name in wanted:
        if name not in devices.CPU_CLASSES:
            raise DeviceError(f"There is no CPU class {name!r}. Classes: {', '.join(devices.CPU_CLASSES)}.")
    progress = progress or Quiet()
    known = Known() if known is None else known
    run = run if isinstance(run, Run) else open_run(Path(run))
    with lock(run.path):
        manifest = manifest_of(run)
        if all(file.precision == "fp32" for file in manifest.files):
            raise RunError(f"{run.path / 'export'} has no int8 files. Export again: kdedge export {run.path} --int8")
        data = load_recorded(run.data, data_dir)
        first = slice(min(images or QUICK_IMAGES, QUICK_IMAGES) if run.quick else images)
        pixels, labels = data.test_images[first], data.test_labels[first]
        said_on = partial(
            measure, run.path / "export", pixels, labels, split="test", threads=os.cpu_count() or 1, known=known
        )
        progress.note(f"this machine: fp32 and int8 on {len(labels):,} test images")
        native = said_on()
        rows = []
        for name in wanted:
            if name == native.device.get("cpu_class"):
                rows += _rows(native, native)
            elif reason := emulated.problem(name):
                rows += _not_validated(name, reason, native)
            else:
                progress.note(f"{name}: int8 on {len(labels):,} test images, emulated, which takes minutes")
                try:
                    rows += _rows(said_on(device=name, precisions=INT8), native)
                except DeviceError as error:
                    rows += _not_validated(name, str(error), native)
        report = CpuClasses(
            recipe=manifest.recipe,
            quick=run.quick,
            n=len(labels),
            device=native.device,
            files={file.path: file.sha256 for file in manifest.files},
            fp32=[row for row in native.rows if row.precision == "fp32"],
            rows=rows,
        )
        report.rows = sorted(report.rows + _kept(run, report), key=lambda row: devices.CPU_CLASSES.index(row.cpu_class))
        write_json(run.path / CPU_CLASSES, report.model_dump(mode="json"))
    return report


def _kept(run: Run, report: CpuClasses) -> list[ClassRow]:
    """What an earlier report has of other classes, measured as this one."""
    try:
        before = read_as(run.path / CPU_CLASSES, CpuClasses)
    except RunError:  # there is none, or it is damaged
        return []
    same = all(before.device.get(key) == report.device.get(key) for key in NUMERICS)
    if not same or (before.files, before.n) != (report.files, report.n):
        return []
    return [row for row in before.rows if row.cpu_class not in {one.cpu_class for one in report.rows}]


def _rows(there: Validation, native: Validation) -> list[ClassRow]:
    """The rows of a class, from what it said and from what this machine said."""
    qemu = there.device.get("emulated")
    rows = []
    for row in there.rows:
        if row.precision == "fp32":
            continue
        compared = (there, row.precision), (native, "fp32"), (native, row.precision)
        said, fp32, here = (one.predictions(row.network, row.role, precision) for one, precision in compared)
        right, fp32_right, _ = (one.right(row.network, row.role, precision) for one, precision in compared)
        drop = paired_drop(fp32_right, right)
        rows.append(
            ClassRow(
                **row.model_dump(
                    include={"network", "role", "precision", "cpu_class", "n", "correct", "accuracy", "accuracy_ci95"}
                ),
                status="validated",
                emulated=qemu is not None,
                qemu=qemu,
                drop_points=round(drop.points, 4),
                upper95_points=round(drop.upper_points, 4),
                agreement_fp32=round(100 * float((said == fp32).mean()), 4),
                agreement_native=round(100 * float((said == here).mean()), 4),
                differing=int((said != here).sum()),
            )
        )
    return rows


def _not_validated(cpu_class: str, reason: str, native: Validation) -> list[ClassRow]:
    return [
        ClassRow(
            **row.model_dump(include={"network", "role", "precision"}),
            cpu_class=cpu_class,
            status="not validated",
            reason=reason,
        )
        for row in native.rows
        if row.precision != "fp32"
    ]


def sentences(report: CpuClasses) -> list[str]:
    """What the table does not say."""
    said = ["The run was --quick: its accuracies mean nothing."] if report.quick else []
    said.append(
        f"as fp32, as here: percent of {report.n:,} test images that get the class of the fp32 and int8 file here."
    )
    reasons = {row.cpu_class: row.reason for row in report.rows if row.reason}
    return [*said, *(f"{name} was not validated: {reason}" for name, reason in reasons.items())]


def rows_to_print(report: CpuClasses) -> tuple[list[str], list[list[str]]]:
    """The rows as a table, one graph after the other."""
    graphs = list(dict.fromkeys(graph_name(row) for row in report.rows))
    rows = sorted(report.rows, key=lambda row: graphs.index(graph_name(row)))
    return ["graph", "CPU class", "run on", "accuracy %", "as fp32", "as here"], [_cells(row) for row in rows]


def graph_name(row: ClassRow) -> str:
    """What a table calls the graph of a row."""
    return f"{row.network} {row.role}" + ("" if row.precision == "int8" else f" {row.precision}")


def _cells(row: ClassRow) -> list[str]:
    names = [graph_name(row), row.cpu_class]
    if row.accuracy is None:
        return [*names, "not validated", "", "", ""]
    where = row.qemu["cpu"] if row.qemu else "this machine"
    agreements = (f"{one:.2f}" for one in (row.agreement_fp32, row.agreement_native))
    return [*names, where, with_interval(row), *agreements]


def with_interval(row: ClassRow) -> str:
    """The accuracy of a row, with half its 95% interval; empty where it was not validated."""
    if row.accuracy is None or row.accuracy_ci95 is None:
        return ""
    low, high = row.accuracy_ci95
    return f"{row.accuracy:.2f} ±{(high - low) / 2:.2f}"
