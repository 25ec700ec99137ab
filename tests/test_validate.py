"""Accuracy of real files in a real runner, on networks whose every answer is known."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_export import exported, labelled_images, pixels, write_export, write_head, write_image_network

from kdedge.errors import DeviceError, RunError
from kdedge.manifest import Manifest
from kdedge.statistics import wilson
from kdedge.store import write_json
from kdedge.validate import Known, Validation, graphs, measure

N = 500


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_export(folder)
    return folder


@pytest.fixture(scope="module")
def validation(run: Path) -> Validation:
    return measure(run / "export", *labelled_images(N), split="validation")


def manifest(run: Path) -> Manifest:
    return Manifest.model_validate_json((run / "export" / "manifest.json").read_text())


def without(found: Manifest, *networks: str) -> Manifest:
    return found.model_copy(update={"files": [file for file in found.files if file.network not in networks]})


def test_graphs_are_whole_networks_and_chains_of_members(run: Path) -> None:
    found = graphs(manifest(run))
    assert [graph.name for graph in found] == [
        f"{name} {precision}"
        for precision in ("fp32", "int8")
        for name in ("teacher teacher", "students merged", "students head")
    ]
    chain = found[2]
    assert [member.network for member in chain.members] == ["students.0", "students.1"]
    assert chain.head and chain.head.path == "head.fp32.onnx"
    assert found[0].head is None and len(found[0].members) == 1


def test_members_are_joined_in_the_order_of_their_numbers(run: Path) -> None:
    found = manifest(run)
    member = next(file for file in found.files if file.role == "member")
    others = [member.model_copy(update={"network": f"students.{number}"}) for number in (10, 2, 9, 3, 5, 4, 8, 6, 7)]
    chain = graphs(found.model_copy(update={"files": [*others, *found.files]}))[2]
    assert [member.network for member in chain.members] == [f"students.{number}" for number in range(11)]


def test_an_export_whose_parts_do_not_fit_is_refused(run: Path) -> None:
    found = manifest(run)
    for broken, message in [
        (without(found, "students"), "2 members of 'students' in fp32 have no head"),
        (without(found, "students.0"), r"head\.fp32\.onnx: its members are \[1\]"),
        (without(found, "students.0", "students.1"), r"its members are \[\]"),
        (found.model_copy(update={"files": found.files * 2}), "expected"),
        (found.model_copy(update={"files": [found.files[0]] * 2}), "2 files are teacher teacher fp32, expected one"),
        (found.model_copy(update={"files": []}), "the export has no files"),
    ]:
        with pytest.raises(RunError, match=message):
            graphs(broken)


def test_a_member_without_a_number_is_refused(run: Path) -> None:
    found = manifest(run)
    member = next(file for file in found.files if file.role == "member").model_copy(update={"network": "students"})
    with pytest.raises(RunError, match=r"expected a member's name like 'students\.0', given 'students'"):
        graphs(found.model_copy(update={"files": [member]}))


def test_accuracies_are_exact_and_have_intervals(validation: Validation) -> None:
    expected = {
        ("teacher", "teacher", "fp32"): N,
        ("teacher", "teacher", "int8"): N * 9 // 10,
        ("students", "merged", "fp32"): N,
        ("students", "merged", "int8"): N * 8 // 10,
        ("students", "head", "fp32"): N,
        ("students", "head", "int8"): N,
    }
    assert {(row.network, row.role, row.precision): row.correct for row in validation.rows} == expected
    for row in validation.rows:
        assert (row.n, row.split) == (N, "validation")
        assert row.accuracy == 100 * row.correct / N
        assert row.accuracy_ci95 == pytest.approx(wilson(row.correct, N), abs=1e-4)
        assert row.cpu_class == validation.device["cpu_class"]


def test_the_document_has_the_promised_keys_and_no_predictions(validation: Validation) -> None:
    document = json.loads(json.dumps(validation.model_dump(mode="json")))
    keys = "network role precision cpu_class split n correct accuracy accuracy_ci95"
    assert list(document) == ["device", "rows"]
    assert all(list(row) == keys.split() for row in document["rows"])
    assert isinstance(document["rows"][0]["accuracy_ci95"], list)


def test_zero_images_are_an_error(run: Path) -> None:
    images, labels = labelled_images(0)
    with pytest.raises(DeviceError, match="expected uint8"):
        measure(run / "export", images, labels, split="test")


def test_a_changed_file_is_not_measured(tmp_path: Path) -> None:
    write_export(tmp_path)
    path = tmp_path / "export" / "students.1.int8.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(RunError, match=r"students\.1\.int8\.onnx was changed"):
        measure(tmp_path / "export", *labelled_images(10), split="test")


def test_a_file_that_is_no_network_is_named(tmp_path: Path) -> None:
    write_export(tmp_path)
    path = tmp_path / "export" / "teacher.fp32.onnx"
    path.write_bytes(path.read_bytes()[:300])
    found = manifest(tmp_path)
    found.files[0] = exported(path, "teacher", "teacher", "fp32")
    write_json(tmp_path / "export" / "manifest.json", found.model_dump(mode="json"))
    with pytest.raises(DeviceError, match=r"runner: teacher\.fp32\.onnx cannot be loaded"):
        measure(tmp_path / "export", *labelled_images(10), split="test")


def test_a_manifest_cannot_reach_out_of_the_export(tmp_path: Path) -> None:
    write_export(tmp_path)
    outside = write_image_network(tmp_path / "outside.onnx", pixels(list(range(10))))
    found = manifest(tmp_path)
    found.files[0] = exported(outside, "teacher", "teacher", "fp32").model_copy(update={"path": "../outside.onnx"})
    write_json(tmp_path / "export" / "manifest.json", found.model_dump(mode="json"))
    with pytest.raises(RunError, match="leads out of"):
        measure(tmp_path / "export", *labelled_images(10), split="test")


def test_files_that_exports_share_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known are files on images: others of either, or another device, are measured."""
    from kdedge.devices import DEVICES, local

    asked: list[str] = []

    def heard(job: Any, files: Any) -> dict[str, Any]:
        asked.extend(graph["name"] for graph in job["graphs"])
        return local.run(job, files)

    def newly_asked(export: Path, n: int = 10, device: str = "heard") -> list[str]:
        asked.clear()
        given = measure(export, *labelled_images(n), split="test", device=device, known=known)
        plain = measure(export, *labelled_images(n), split="test")
        assert given.rows == plain.rows and given.device["cpu"] == plain.device["cpu"]
        assert all(np.array_equal(given._predictions[name], plain._predictions[name]) for name in plain._predictions)
        return asked

    for device in ("heard", "other"):
        monkeypatch.setitem(DEVICES, device, heard)
    known = Known()
    export = tmp_path / "export"
    write_export(tmp_path)
    every = graphs(manifest(tmp_path))
    everything = list(
        {tuple(file.sha256 for file in (*one.members, one.head) if file): one.name for one in every}.values()
    )
    assert newly_asked(export) == everything
    assert newly_asked(export) == []
    assert newly_asked(export, n=11) == everything
    assert newly_asked(export, device="other") == everything

    head = write_head(export / "head.fp32.onnx", np.eye(10, dtype=np.float32)[::-1])
    found = manifest(tmp_path)
    place = next(i for i, file in enumerate(found.files) if file.path == head.name)
    found.files[place] = exported(head, "students", "head", "fp32")
    write_json(export / "manifest.json", found.model_dump(mode="json"))
    assert newly_asked(export) == ["students head fp32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"correct": 3}, "counted 3 of 10, its predictions give 10"),
        ({"n": 3}, "counted 10 of 3"),
        ({"predictions": [1, 2]}, "2 predictions for 10 images"),
        ({"name": "other"}, "answered for other files"),
    ],
)
def test_a_device_that_contradicts_itself_is_not_believed(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    from kdedge.devices import DEVICES, local

    def liar(job: Any, files: Any) -> dict[str, Any]:
        answer = local.run(job, files)
        answer["graphs"][0] |= change
        return answer

    monkeypatch.setitem(DEVICES, "liar", liar)
    with pytest.raises(DeviceError, match=message):
        measure(run / "export", *labelled_images(10), split="test", device="liar")
