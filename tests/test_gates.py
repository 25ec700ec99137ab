"""The gates, on networks whose every answer is known: the bound, the classes, and the forms that are tried."""

import copy
import json
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_export import Notes, exported, labelled_images, pixels, write_export, write_head, write_image_network

from exporters import int8
from kdedge import devices
from kdedge.devices import emulated, local
from kdedge.errors import GateError
from kdedge.gates import gate, judge, places
from kdedge.manifest import FORMS, ExportedFile, Manifest, Place, Precision
from kdedge.recipe import Bench, Deploy, Int8
from kdedge.statistics import paired_drop
from kdedge.validate import Validation, measure

N = 500
TEACHER, MERGED, HEAD = ("teacher", "teacher"), ("students", "merged"), ("students", "head")


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Validation:
    """int8 loses a tenth of the images with the teacher, a fifth with the merged network, and none with the chain."""
    folder = tmp_path_factory.mktemp("run")
    write_export(folder)
    return measure(folder / "export", *labelled_images(N), split="validation")


def test_the_gate_bounds_the_paired_drop_from_above(validation: Validation) -> None:
    teacher, merged, head = (gate(validation, validation, place, "int8", 13.0) for place in (TEACHER, MERGED, HEAD))
    assert (teacher.drop_points, teacher.only_fp32, teacher.only_int8, teacher.n) == (10.0, 50, 0, N)
    # Agresti and Min: (b - c) / (n + 2) + 1.96 sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2) with b = 50, c = 0
    bound = 100 * (50 + 1.959964 * math.sqrt(51 - 2500 / 502)) / 502
    assert teacher.upper95_points == pytest.approx(bound, abs=1e-4)
    assert teacher.passed and not merged.passed and head.passed
    where = validation.device["cpu_class"]
    assert teacher.reason.startswith(f"teacher (teacher): int8 drops by 10.00 points on 500 images on {where}, with")
    assert (teacher.cpu_class, teacher.precision, teacher.place) == (where, "int8", TEACHER)


def test_the_gate_compares_the_bound_and_not_the_drop(validation: Validation) -> None:
    """The teacher's drop is 10 points, its bound about 12.6."""
    passed = [gate(validation, validation, TEACHER, "int8", limit).passed for limit in (12.5, 12.7, math.nan)]
    assert passed == [False, True, False]


def test_fewer_images_are_the_first_ones(validation: Validation) -> None:
    some = Validation(device={"cpu_class": "x86-sse"}, rows=[])
    some._right = {key: right[:100] for key, right in validation._right.items()}
    result = gate(validation, some, TEACHER, "int8", 20.0)
    assert (result.n, result.only_fp32, result.cpu_class) == (100, 10, "x86-sse")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_gate_fails_what_was_not_measured_in_both_precisions(validation: Validation, precision: str) -> None:
    half = Validation(device=validation.device, rows=[])
    half._right = {key: right for key, right in validation._right.items() if key[2] == precision}
    result = gate(half, half, TEACHER, "int8", 100.0)
    assert (result.passed, result.drop_points) == (False, None)
    missing = "int8" if precision == "fp32" else "fp32"
    assert result.reason == f"teacher (teacher) on {validation.device['cpu_class']}: not measured in {missing}"


def test_the_gate_fails_on_other_images(validation: Validation) -> None:
    more = Validation(device={}, rows=[])
    more._right = {key: np.ones(N + 1, bool) for key in validation._right}
    result = gate(validation, more, HEAD, "int8", 100.0)
    assert not result.passed and result.reason.endswith("not measured in both on the same images")


def test_too_few_images_are_said_to_be(validation: Validation) -> None:
    """Of 500 images that all get the same class, the bound is 1.96 sqrt(1) / 502."""
    result = gate(validation, validation, HEAD, "int8", 0.3)
    assert not result.passed
    assert result.reason.endswith("0.3 are allowed; 500 images cannot show less than 0.39, keep more for validation")


class Export:
    """An export folder that is judged, and which forms were asked of it."""

    def __init__(self, folder: Path) -> None:
        self.manifest = write_export(folder).model_copy(update={"gates": []})
        self.folder, self.asked = folder / "export", list[tuple[str, list[Place]]]()
        self.notes, self.rounds = Notes(), 3

    def write(
        self, form: Precision, wanted: Collection[Place], columns: Callable[[Precision], list[int]]
    ) -> list[ExportedFile]:
        self.asked.append((form, list(wanted)))
        files = []
        for network, role in wanted:
            if role == "head":
                for member, part in enumerate((list(range(5)), list(range(5, 10)))):
                    path = write_image_network(self.folder / f"{network}.{member}.{form}.onnx", pixels(part), "dense")
                    files.append(exported(path, f"{network}.{member}", "member", form))
                weights = 2 * np.diag(np.array(columns(form), np.float32) >= 0).astype(
                    np.float32
                )  # not the bytes of int8
                path = write_head(self.folder / f"{network}.head.{form}.onnx", weights)
            else:
                path = write_image_network(self.folder / f"{network}.{form}.onnx", pixels(columns(form)))
            files.append(exported(path, network, role, form))
        return files

    def judge(self, *cpu_classes: str, limit: float = 5.0, columns: Callable[[Precision], list[int]]) -> Manifest:
        deploy = Deploy(int8=Int8(max_drop_points=limit), cpu_classes=cpu_classes)
        judge(
            self.folder,
            self.manifest,
            *labelled_images(N),
            deploy,
            Bench(rounds=self.rounds, seconds=0.001),
            lambda form, wanted: self.write(form, wanted, columns),
            progress=self.notes,
        )
        return self.manifest


@pytest.fixture
def export(tmp_path: Path) -> Export:
    return Export(tmp_path)


@pytest.fixture
def pace() -> dict[str, int]:
    """What a run takes here in each form, in ns: what is timed in tests would be noise."""
    return {"int8": 1000, "int8-u8u8": 1000}


@pytest.fixture(autouse=True)
def classes(monkeypatch: pytest.MonkeyPatch, pace: dict[str, int]) -> dict[str, Any]:
    """The runner is on x86-avx2, wherever the tests run; x86-sse can be emulated, and gets classes 8 and 9 wrong in int8."""

    def native(job: Any, files: Any) -> dict[str, Any]:
        answer = local.run(job, files)
        answer["device"]["cpu_class"] = "x86-avx2"
        if job["task"] == "latency":
            for one in answer["graphs"]:
                one["latencies_ns"] = [pace[one["name"].split()[2]]] * 20
        return answer

    def other(job: Any, files: Any) -> dict[str, Any]:
        answer = copy.deepcopy(local.run(job, files))
        answer["device"]["cpu_class"] = "x86-sse"
        for one in answer["graphs"]:
            if one["name"].endswith(" int8"):
                one["predictions"] = [min(said, 7) for said in one["predictions"]]
                one["correct"] = sum(said == i % 10 for i, said in enumerate(one["predictions"]))
        return answer

    monkeypatch.setitem(devices.DEVICES, "cpu", native)
    monkeypatch.setattr(devices, "EMULATED", {"x86-sse": other})
    monkeypatch.setattr(emulated, "problem", lambda name: None if name == "x86-sse" else f"no {name} here.")
    return devices.EMULATED


def right(form: Precision) -> list[int]:
    return list(range(10))


def test_what_fails_is_written_in_the_next_form(export: Export) -> None:
    """The chain passes in int8; teacher and merged network do not, and pass in the first form after it."""
    manifest = export.judge(columns=right)
    assert export.asked == [("int8-u8u8", [TEACHER, MERGED])]
    verdicts = [(one.place, one.precision, one.passed) for one in manifest.gates]
    assert verdicts == [
        *((place, "int8", place == HEAD) for place in (TEACHER, MERGED, HEAD)),
        *((place, "int8-u8u8", True) for place in (TEACHER, MERGED)),
    ]
    assert {one.cpu_class for one in manifest.gates} == {"x86-avx2"} and manifest.refused == []
    shipped = {"x86-avx2": ["students.0.int8.onnx", "students.1.int8.onnx", "head.int8.onnx"]}
    shipped["x86-avx2"] += ["teacher.int8-u8u8.onnx", "students.int8-u8u8.onnx"]
    assert manifest.ships == shipped
    assert places(manifest, "int8") == [HEAD]
    left = {path.name for path in export.folder.glob("*.onnx")}
    assert left == {file.path for file in manifest.files} and "teacher.int8.onnx" not in left
    accuracy = {(row.network, row.role, row.precision): row.accuracy for row in manifest.accuracy}
    assert set(accuracy.values()) == {100.0} and len(accuracy) == 6


def test_when_no_form_passes_only_the_first_is_left_and_every_verdict_told(export: Export) -> None:
    manifest = export.judge(columns=lambda form: [*range(9), -1])
    assert [form for form, _ in export.asked] == list(FORMS[1:])
    tried = [one.precision for one in manifest.refused if one.place == TEACHER]
    assert tried == list(FORMS)
    assert {file.path for file in manifest.files if file.precision not in ("fp32", "int8")} == set()
    assert list(export.folder.glob("*u8u8*")) == []
    assert places(manifest, "int8") == [TEACHER, MERGED, HEAD]


def test_a_bound_that_no_file_can_keep_is_not_tried_in_other_forms(export: Export) -> None:
    limit = paired_drop(np.ones(N, bool), np.ones(N, bool)).upper_points - 0.01
    manifest = export.judge(columns=right, limit=limit)
    assert export.asked == [] and len(manifest.refused) == 3


def test_one_form_that_does_for_every_class_ships_alone(export: Export) -> None:
    """x86-sse takes all of int8 for wrong, so it gets another form, which is as good and as fast here."""
    manifest = export.judge("x86-avx2", "x86-sse", limit=13.0, columns=right)
    shipped = ["students.0.int8-u8u8.onnx", "students.1.int8-u8u8.onnx", "students.head.int8-u8u8.onnx"]
    shipped += ["teacher.int8-u8u8.onnx", "students.int8-u8u8.onnx"]
    assert {name: sorted(files) for name, files in manifest.ships.items()} == {
        name: sorted(shipped) for name in ("x86-avx2", "x86-sse")
    }
    assert places(manifest, "int8") == [] and not list(export.folder.glob("*.int8.onnx"))
    assert manifest.refused == []
    # The merged network has that form already, for this machine; the chain's one is a file here.
    assert export.asked == [("int8-u8u8", [MERGED]), ("int8-u8u8", [TEACHER, HEAD])]
    assert {row.cpu_class for row in manifest.accuracy} == {"x86-avx2"}
    assert "students (head): int8-u8u8 does for x86-avx2, x86-sse, so it ships alone" in export.notes.said


def test_two_forms_ship_where_one_for_all_is_slower_here(export: Export, pace: dict[str, int]) -> None:
    pace["int8-u8u8"] = 1100
    manifest = export.judge("x86-avx2", "x86-sse", limit=13.0, columns=right)
    here, there = (manifest.ships[cpu_class] for cpu_class in ("x86-avx2", "x86-sse"))
    assert "teacher.int8.onnx" in here and "head.int8.onnx" in here and "students.int8-u8u8.onnx" in here
    assert "teacher.int8-u8u8.onnx" in there and "students.int8-u8u8.onnx" in there and "teacher.int8.onnx" not in there
    assert (
        "students (head): int8-u8u8 does not ship alone, as it takes 1.10 times as long as int8 here"
        in export.notes.said
    )


def test_two_forms_ship_where_two_rounds_do_not_tell_which_is_slower(export: Export) -> None:
    export.rounds = 2
    manifest = export.judge("x86-avx2", "x86-sse", limit=13.0, columns=right)
    assert "head.int8.onnx" in manifest.ships["x86-avx2"]
    said = "students (head): int8-u8u8 does not ship alone, as 2 rounds do not tell how fast it is here"
    assert said in export.notes.said


def test_two_forms_ship_where_one_for_all_is_less_accurate(export: Export) -> None:
    """In the other form the chain loses a tenth of the images, which passes on both classes; in int8 it loses none here."""
    manifest = export.judge("x86-avx2", "x86-sse", limit=13.0, columns=lambda form: [*range(9), -1])
    here, there = (manifest.ships[cpu_class] for cpu_class in ("x86-avx2", "x86-sse"))
    assert "head.int8.onnx" in here and "students.head.int8-u8u8.onnx" in there
    said = "students (head): int8-u8u8 does not ship alone, as it loses 10.00 points against int8 on x86-avx2"
    assert said in export.notes.said
    verdicts = [(one.cpu_class, one.precision, one.passed) for one in manifest.gates if one.place == HEAD]
    assert verdicts == [
        ("x86-avx2", "int8", True),
        ("x86-sse", "int8", False),
        ("x86-sse", "int8-u8u8", True),
        ("x86-avx2", "int8-u8u8", True),
    ]


def test_a_class_that_cannot_be_run_has_not_passed(export: Export, classes: dict[str, Any]) -> None:
    manifest = export.judge("arm64", limit=100.0, columns=right)
    assert [one.place for one in manifest.refused] == [TEACHER, MERGED, HEAD]
    assert manifest.refused[0].reason == "teacher (teacher) on arm64: not validated: no arm64 here."
    assert manifest.ships == {} and manifest.refused[0].drop_points is None

    classes["x86-sse"] = devices.DEVICES["cpu"]  # which says that it is something else
    manifest = export.judge("x86-sse", limit=100.0, columns=right)
    assert manifest.refused[-1].reason.endswith(
        "on x86-sse: not validated: x86-sse: the runner says that it ran on x86-avx2"
    )


def test_there_has_to_be_something_to_judge(export: Export) -> None:
    export.manifest.files = [file for file in export.manifest.files if file.precision == "fp32"]
    with pytest.raises(GateError, match="nothing to judge"):
        export.judge(columns=right)


def test_the_manifest_knows_the_forms_that_the_exporter_has() -> None:
    assert list(FORMS) == list(int8.FORMS)
    document = json.loads(Manifest(recipe="x", files=[]).model_dump_json())
    assert document["ships"] == {} and "refused" not in document
