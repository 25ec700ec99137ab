"""The table of contents of an export: it comes back, and neither it nor the files that it names are believed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdedge.errors import RunError
from kdedge.manifest import DataRecord, ExportedFile, GateResult, Manifest, ValidationRow, check_file, read_manifest
from kdedge.store import sha256, write_bytes, write_json

PLACE = {"network": "a", "role": "teacher"}
ACCURACY = PLACE | {"precision": "int8", "cpu_class": "arm64", "split": "validation", "n": 4, "correct": 3}
GATE = {"drop_points": None, "upper95_points": None, "max_drop_points": 0.5, "passed": False}


def exported(folder: Path, path: str = "a.onnx") -> ExportedFile:
    file = folder / "a.onnx"
    write_bytes(file, b"network")
    fields = PLACE | {"precision": "fp32", "parameters": 1, "inputs": [], "outputs": []}
    return ExportedFile.model_validate(fields | {"path": path, "sha256": sha256(file), "bytes": 7})


def full(folder: Path) -> Manifest:
    return Manifest(
        recipe="r",
        files=[exported(folder)],
        data=DataRecord.model_validate({"name": "mnist", "as": "rgb32", "fingerprint": "f"}),
        validation=[3, 5],
        accuracy=[ValidationRow.model_validate(ACCURACY | {"accuracy": 75.0, "accuracy_ci95": (30.1, 95.4)})],
        gates=[GateResult.model_validate(PLACE | GATE | {"only_fp32": 0, "only_int8": 0, "n": 0, "reason": "none"})],
    )


def test_a_manifest_comes_back(tmp_path: Path) -> None:
    manifest = full(tmp_path)
    document = manifest.model_dump(mode="json")
    assert document["data"] == {"name": "mnist", "as": "rgb32", "fingerprint": "f"}
    write_json(tmp_path / "manifest.json", document)
    assert read_manifest(tmp_path) == manifest


def test_a_manifest_from_before_its_newest_fields_is_read(tmp_path: Path) -> None:
    document = full(tmp_path).model_dump(mode="json", exclude={"data", "validation"})
    write_json(tmp_path / "manifest.json", document)
    found = read_manifest(tmp_path)
    assert (found.format, found.data, found.validation) == (1, None, [])


def test_a_folder_without_a_manifest_is_no_export(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is no export: it has no manifest\.json. Make one with `kdedge export --int8`"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("form", [2, 0, "1", None, [1], {"1": 1}])
def test_a_format_that_is_not_known_is_told(tmp_path: Path, form: object) -> None:
    document = full(tmp_path).model_dump(mode="json") | {"format": form}
    document["files"] = "in a form that only the other kdedge knows"
    write_json(tmp_path / "manifest.json", document)
    with pytest.raises(RunError, match=r"manifest\.json: expected format 1, found .*Use the kdedge that wrote it\.$"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (["files"], None, "files: "),
        (["files", 0, "role"], "assistant", "files.0.role: "),
        (["files", 0, "bytes"], "many", "files.0.bytes: "),
        (["data", "as"], "rgb64", "data.as: "),
        (["validation"], [1, "two"], "validation.1: "),
        (["accuracy", 0, "correct"], "most", "accuracy.0.correct: "),
        (["gates", 0], [], "gates.0: "),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, keys: list[Any], value: object, said: str) -> None:
    document = full(tmp_path).model_dump(mode="json")
    place = document
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(RunError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'manifest.json'} is damaged: {said}")


def test_an_exported_file_is_checked_before_use(tmp_path: Path) -> None:
    file = exported(tmp_path)
    assert check_file(tmp_path, file) == tmp_path / "a.onnx"
    (tmp_path / "a.onnx").write_bytes(b"netword")
    with pytest.raises(RunError, match=r"a\.onnx was changed: the manifest says SHA-256 .*Export again"):
        check_file(tmp_path, file)
    (tmp_path / "a.onnx").write_bytes(b"net")
    with pytest.raises(
        RunError, match=r"a\.onnx was changed: the manifest says 7 bytes, the file has 3\. Export again"
    ):
        check_file(tmp_path, file)
    (tmp_path / "a.onnx").unlink()
    with pytest.raises(RunError, match=r"a\.onnx is missing, though the manifest lists it"):
        check_file(tmp_path, file)


@pytest.mark.parametrize("path", ["../a.onnx", "/etc/hostname", "link.onnx", "a\0.onnx"])
def test_a_file_outside_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "link.onnx").symlink_to(tmp_path / "a.onnx")
    with pytest.raises(RunError, match="leads out of"):
        check_file(tmp_path / "export", exported(tmp_path, path))


@pytest.mark.parametrize("path", ["", ".", "missing.onnx", "folder", "n" * 300])
def test_what_is_no_file_is_missing_or_cannot_be_read(tmp_path: Path, path: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(RunError, match="is missing, though|cannot be read: File name too long"):
        check_file(tmp_path, exported(tmp_path, path))
