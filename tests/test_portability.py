"""int8 files on CPU classes: rows of classes whose every answer is known, and what is said of the others."""

import copy
import inspect
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from tiny_export import write_data, write_run

from kdedge import devices
from kdedge.devices import emulated, local
from kdedge.errors import DeviceError, RunError
from kdedge.manifest import read_manifest
from kdedge.portability import ClassRow, CpuClasses, rows_to_print, sentences, validate
from kdedge.progress import Quiet
from kdedge.statistics import wilson
from kdedge.store import open_run, write_json

N = 200


class Said(Quiet):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


ANSWERS: dict[str, dict[str, Any]] = {}
LOADS = itertools.count()  # a machine is never twice the same


def runner(job: Any, files: Any) -> dict[str, Any]:
    """The runner's answer; it runs once for a job, which names its files by their hashes."""
    key = json.dumps(job)
    if key not in ANSWERS:
        ANSWERS[key] = local.run(job, files)
    return copy.deepcopy(ANSWERS[key])


def other_cpu(job: Any, files: Any) -> dict[str, Any]:
    """An x86-sse that says class 5 for the images 4, 5 and 6."""
    answer = runner(job, files)
    answer["device"] |= {"cpu_class": "x86-sse", "emulated": {"qemu": "7.2.22", "cpu": "Nehalem"}}
    for graph in answer["graphs"]:
        right_before = sum(graph["predictions"][i] == i for i in (4, 5, 6))
        graph["predictions"][4:7] = [5] * 3
        graph["correct"] += 1 - right_before
    return answer


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), N)


@pytest.fixture
def folder(tmp_path: Path, data_dir: Path) -> Path:
    return write_run(tmp_path / "tiny", data_dir).path


@pytest.fixture(autouse=True)
def classes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """One class can be emulated here, and the runner is on x86-avx2, wherever the tests run."""

    def native(job: Any, files: Any) -> dict[str, Any]:
        answer = runner(job, files)
        answer["device"] |= {"cpu_class": "x86-avx2", "load_average_1min": next(LOADS)}
        return answer

    monkeypatch.setitem(devices.DEVICES, "cpu", native)
    found = {"x86-sse": other_cpu}
    monkeypatch.setattr(devices, "EMULATED", found)
    monkeypatch.setattr(emulated, "problem", lambda name: None if name in found else f"no {name} here.")
    return found


def by_place(report: CpuClasses) -> dict[tuple[str, str, str], ClassRow]:
    return {(row.network, row.role, row.cpu_class): row for row in report.rows}


def test_every_class_has_a_row_for_every_graph(folder: Path, data_dir: Path) -> None:
    said = Said()
    report = validate(folder, data_dir=data_dir, progress=said)
    document = json.loads((folder / "cpu_classes.json").read_text())
    assert document == report.model_dump(mode="json")
    assert (report.split, report.n, report.quick) == ("test", N, False)
    assert [(row.network, row.role, row.cpu_class) for row in report.rows] == [
        (*graph, name)
        for name in devices.CPU_CLASSES
        for graph in (("teacher", "teacher"), ("students", "merged"), ("students", "head"))
    ]
    status = {row.cpu_class: row.status for row in report.rows}
    assert status == dict.fromkeys(devices.CPU_CLASSES, "not validated") | {
        "x86-avx2": "validated",
        "x86-sse": "validated",
    }
    assert [row.precision for row in report.fp32] == ["fp32"] * 3
    assert set(report.files) == {path.name for path in (folder / "export").glob("*.onnx")}
    assert said.notes == [
        "this machine: fp32 and int8 on 200 test images",
        "x86-sse: int8 on 200 test images, emulated, which takes minutes",
    ]


def test_figures_are_against_fp32_and_against_this_machine(folder: Path, data_dir: Path) -> None:
    """Of the int8 teacher 20 images are wrong here; there images 4 and 6 as well."""
    rows = by_place(validate(folder, data_dir=data_dir))
    here, there = rows["teacher", "teacher", "x86-avx2"], rows["teacher", "teacher", "x86-sse"]
    assert (here.emulated, here.qemu, here.correct, here.drop_points) == (False, None, 180, 10.0)
    assert (here.agreement_fp32, here.agreement_native, here.differing) == (90.0, 100.0, 0)
    assert (there.emulated, there.qemu) == (True, {"qemu": "7.2.22", "cpu": "Nehalem"})
    assert (there.n, there.correct, there.accuracy, there.drop_points) == (N, 178, 89.0, 11.0)
    assert there.accuracy_ci95 == pytest.approx(wilson(178, N), abs=1e-4)
    assert there.upper95_points is not None and there.upper95_points > 11
    assert (there.agreement_fp32, there.agreement_native, there.differing) == (89.0, 99.0, 2)


def test_what_was_not_validated_has_a_reason_and_no_figures(folder: Path, data_dir: Path) -> None:
    row = by_place(validate(folder, data_dir=data_dir))["teacher", "teacher", "x86-vnni"]
    empty = ClassRow(
        network="teacher", role="teacher", cpu_class="x86-vnni", status="not validated", reason="no x86-vnni here."
    )
    assert row == empty and row.accuracy is row.emulated is row.differing is None


def test_an_emulation_that_fails_is_not_validated(
    folder: Path, data_dir: Path, classes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(job: Any, files: Any) -> dict[str, Any]:
        raise DeviceError("killed by signal 4 (Illegal instruction)")

    classes["x86-sse"] = dies
    (row, *_) = validate(folder, cpu_classes=["x86-sse"], data_dir=data_dir).rows
    assert (row.status, row.reason) == ("not validated", "killed by signal 4 (Illegal instruction)")

    classes["x86-sse"] = devices.DEVICES["cpu"]
    (row, *_) = validate(folder, cpu_classes=["x86-sse"], data_dir=data_dir).rows
    assert (row.status, row.reason) == ("not validated", "x86-sse: the runner says that it ran on x86-avx2")


def test_classes_are_chosen_and_an_unknown_one_is_refused_before_anything_is_run(
    folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = validate(folder, cpu_classes=["x86-sse", "arm64", "x86-sse"], data_dir=data_dir)
    assert list(dict.fromkeys(row.cpu_class for row in report.rows)) == ["x86-sse", "arm64"]
    monkeypatch.setattr(devices, "DEVICES", {})
    with pytest.raises(DeviceError, match=r"There is no CPU class 'x86-vnn'\. Classes: x86-vnni, .*arm64\."):
        validate(folder, cpu_classes=["x86-vnn"], data_dir=data_dir)


def test_the_first_of_the_images_or_all(folder: Path, data_dir: Path) -> None:
    assert inspect.signature(validate).parameters["images"].default == 2000
    for images, n in ((50, 50), (N + 1, N), (None, N)):
        report = validate(folder, cpu_classes=["x86-sse"], images=images, data_dir=data_dir)
        assert {report.n, *(row.n for row in (*report.rows, *report.fp32))} == {n}


def test_a_quick_run_is_measured_on_few_images_at_most(
    folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdedge.portability.QUICK_IMAGES", 60)
    run = open_run(folder)
    run.quick = True
    found = [validate(run, cpu_classes=["x86-sse"], images=n, data_dir=data_dir).n for n in (50, 100, None)]
    assert found == [50, 60, 60]


def test_what_is_known_of_other_classes_is_kept(folder: Path, data_dir: Path) -> None:
    one, other = (validate(folder, cpu_classes=[name], data_dir=data_dir) for name in ("x86-sse", "x86-avx2"))
    assert {row.cpu_class for row in one.rows} == {"x86-sse"}
    assert list(dict.fromkeys(row.cpu_class for row in other.rows)) == ["x86-avx2", "x86-sse"]
    assert [row for row in other.rows if row.cpu_class == "x86-sse"] == one.rows
    again = validate(folder, cpu_classes=["x86-sse"], images=50, data_dir=data_dir)
    assert {row.cpu_class for row in again.rows} == {"x86-sse"}  # the others are of other images


def test_an_export_of_other_weights_is_refused(folder: Path, data_dir: Path) -> None:
    run = open_run(folder)
    run.stages[0].key = "1" * 64
    with pytest.raises(RunError, match=f"other weights than the run has now. Export again: kdedge export {folder}"):
        validate(run, data_dir=data_dir)


def test_an_export_without_int8_says_how_to_get_it(folder: Path, data_dir: Path) -> None:
    manifest = read_manifest(folder / "export")
    manifest.files = [file for file in manifest.files if file.precision == "fp32"]
    write_json(folder / "export/manifest.json", manifest.model_dump(mode="json"))
    with pytest.raises(RunError, match=f"has no int8 files. Export again: kdedge export {folder} --int8"):
        validate(folder, data_dir=data_dir)


def test_the_table_fits_80_columns_and_the_reasons_are_said_below(folder: Path, data_dir: Path) -> None:
    report = validate(folder, data_dir=data_dir)
    header, rows = rows_to_print(report)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    assert sum(widths) + 2 * (len(widths) - 1) <= 80
    here, there = ((high - low) / 2 for low, high in (wilson(180, N), wilson(178, N)))
    assert rows[1:3] == [
        ["teacher teacher", "x86-avx2", "this machine", f"90.00 ±{here:.2f}", "90.00", "100.00"],
        ["teacher teacher", "x86-sse", "Nehalem", f"89.00 ±{there:.2f}", "89.00", "99.00"],
    ]
    assert rows[0] == ["teacher teacher", "x86-vnni", "not validated", "", "", ""]
    assert sentences(report)[1:] == [
        f"{name} was not validated: no {name} here." for name in ("x86-vnni", "arm64-dotprod", "arm64")
    ]


def test_no_figure_is_a_time(folder: Path, data_dir: Path) -> None:
    validate(folder, cpu_classes=["x86-sse"], data_dir=data_dir)
    text = (folder / "cpu_classes.json").read_text()
    assert "latency" not in text and "_ms" not in text and str(os.getcwd()) not in text
