"""An export folder alone: a good one passes with known figures, each bad one is an error in words, and none is a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto
from tiny_export import GATE, write_data, write_export, write_run

from kdedge.cli import main
from kdedge.data.load import load
from kdedge.devices import DEVICES, local
from kdedge.errors import DataError, PackageError
from kdedge.manifest import DataRecord, ValidationRow
from kdedge.store import sha256, write_json
from kdedge.verification import verify

N = 400
VALIDATION = list(range(100, 300))
RIGHT = {  # of the 200 validation images: the int8 files are blind for one class and for two
    ("teacher", "teacher", "fp32"): 200,
    ("teacher", "teacher", "int8"): 180,
    ("students", "merged", "fp32"): 200,
    ("students", "merged", "int8"): 160,
    ("students", "head", "fp32"): 200,
    ("students", "head", "int8"): 200,
}
WEIRD = [None, True, -1, 10**30, 1e999, "", "..", "../x", "a\0b", "\ud800", "int8", [], [[]], {}, {"format": 1}]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), N)


@pytest.fixture(scope="module")
def original(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole export folder that nobody changes; its run is gone."""
    run = tmp_path_factory.mktemp("run")
    manifest = write_export(run)
    fingerprint = load("fashion-mnist", data).fingerprint
    manifest.data = DataRecord.model_validate({"name": "fashion-mnist", "fingerprint": fingerprint})
    manifest.validation = VALIDATION
    for (network, role, precision), correct in RIGHT.items():
        told = {"network": network, "role": role, "precision": precision, "cpu_class": "arm64", "split": "validation"}
        figures = {"n": 200, "correct": correct, "accuracy": correct / 2, "accuracy_ci95": (0, 100)}
        manifest.accuracy.append(ValidationRow.model_validate(told | figures))
    write_json(run / "export" / "manifest.json", manifest.model_dump(mode="json"))
    return (run / "export").rename(tmp_path_factory.mktemp("elsewhere") / "copied")


@pytest.fixture
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, on a machine that has no data and no network."""

    def download(*_: object) -> None:
        raise AssertionError("verify must not download")

    monkeypatch.setattr("kdedge.data.load._download", download)
    monkeypatch.setattr("kdedge.data.load.SYSTEM_FOLDER", tmp_path / "system")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("KDEDGE_DATA", raising=False)
    return Path(shutil.copytree(original, tmp_path / "copied"))


@pytest.fixture(scope="module")
def answers(original: Path, data: Path) -> dict[str, Any]:
    """What this machine answers for the whole folder, by task."""
    heard = {}

    def listen(job: Any, files: Any) -> dict[str, Any]:
        heard[job["task"]] = local.run(job, files)
        return heard[job["task"]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DEVICES, "cpu", listen)
        verify(original, data_dir=data)
    return heard


def change(folder: Path, **fields: Any) -> None:
    """Write these fields into the manifest."""
    document = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(document | fields))


def sign(folder: Path, name: str) -> None:
    """Give the manifest the hash that the file `name` has now, as whoever changes both would."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    for file in files:
        if file["path"] == name:
            file |= {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
    change(folder, files=files)


# A good one


def test_a_copied_folder_is_verified_by_itself(folder: Path, data: Path) -> None:
    said: list[str] = []
    found = verify(folder, data_dir=data, progress=said.append)
    assert (found.folder, found.recipe, found.opset) == (str(folder), "tiny", 20)
    assert {(file.network, file.role, file.precision): file.accuracy for file in found.files if file.accuracy} == {
        place: correct / 2 for place, correct in RIGHT.items()
    }
    assert all(file.recorded_accuracy == file.accuracy for file in found.files)
    assert all(file.float_nodes == (["product (MatMul)"] if file.precision == "int8" else None) for file in found.files)
    assert found.device["cpu_class"] and found.device["onnxruntime"]
    assert found.notes == [
        f"The 10 files in {folder} are those of its manifest: SHA-256, opset 20, inputs and outputs, and what stays in float.",
        "Their accuracy on 200 validation images is that of the manifest, but for 1 at most.",
    ]
    assert said == ["loading 10 files", "accuracy on 200 validation images"]


def test_without_data_all_but_the_accuracy_is_verified(folder: Path) -> None:
    found = verify(str(folder))
    assert len(found.files) == 10 and all(file.accuracy is None for file in found.files)
    assert [file.recorded_accuracy for file in found.files[:2]] == [100, 100]
    assert found.notes[1].startswith("Their accuracy was not measured. Dataset 'fashion-mnist' is in none of ")


def test_other_data_is_a_note_and_where_it_was_named_an_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_data(tmp_path / "other", N + 1)
    with pytest.raises(DataError, match="is not the data of this run"):
        verify(folder, data_dir=other)
    monkeypatch.setenv("KDEDGE_DATA", str(other))
    assert "is not the data of this run" in verify(folder).notes[1]


@pytest.mark.parametrize("fields", [{"data": None}, {"validation": []}])
def test_a_manifest_from_before_data_was_recorded_is_verified_without(
    folder: Path, data: Path, fields: dict[str, Any]
) -> None:
    change(folder, **fields)
    assert "does not say on which images" in verify(folder, data_dir=data).notes[1]


def test_what_quick_figures_are_worth_is_said(folder: Path) -> None:
    change(folder, quick=True)
    assert verify(folder).notes[-1] == "The export is of a --quick run: its accuracies mean nothing."


def test_the_export_of_a_run_is_verified_by_the_run_and_by_its_folder(tmp_path: Path, data: Path) -> None:
    run = write_run(tmp_path / "tiny", data)
    assert verify(run).folder == verify(run.path).folder == str(run.path / "export")


@pytest.mark.parametrize(
    ("correct", "accuracy", "good"),
    [
        *((correct, correct / 2, True) for correct in (179, 180, 181)),
        *((correct, correct / 2, False) for correct in (178, 182)),
        *((180, accuracy, False) for accuracy in (89, 91, 1e9, float("nan"))),
    ],
)
def test_one_image_may_be_right_here_and_wrong_there(
    folder: Path,
    data: Path,
    answers: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    correct: int,
    accuracy: float,
    good: bool,
) -> None:
    monkeypatch.setitem(DEVICES, "cpu", lambda job, files: answers[job["task"]])
    rows = json.loads((folder / "manifest.json").read_text())["accuracy"]
    rows[1] |= {"correct": correct, "accuracy": accuracy}
    change(folder, accuracy=rows)
    if good:
        assert verify(folder, data_dir=data).files[5].accuracy == 90
        return
    with pytest.raises(PackageError) as caught:
        verify(folder, data_dir=data)
    here = answers["accuracy"]["device"]["cpu_class"]
    assert caught.value.problems == [
        f"teacher teacher int8: 90.00% of 200 validation images are right on {here}, the manifest says "
        f"{accuracy:.2f}%, measured on arm64"
    ]


# Bad ones


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def no_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("files: []")


def a_list(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


def other_shape(folder: Path) -> None:
    change(folder, files={"teacher.fp32.onnx": "f00d"})


def newer_format(folder: Path) -> None:
    change(folder, format=2)


def no_files(folder: Path) -> None:
    change(folder, files=[])


def missing(folder: Path) -> None:
    (folder / "teacher.fp32.onnx").unlink()


def truncated(folder: Path) -> None:
    path = folder / "teacher.fp32.onnx"
    path.write_bytes(path.read_bytes()[:1000])


def flipped(folder: Path) -> None:
    content = bytearray((folder / "teacher.fp32.onnx").read_bytes())
    content[5000] ^= 1
    (folder / "teacher.fp32.onnx").write_bytes(content)


def elsewhere(folder: Path, path: str) -> None:
    shutil.copy(folder / "teacher.fp32.onnx", folder.parent / "outside.onnx")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    change(folder, files=[files[0] | {"path": path}, *files[1:]])


def beside_the_folder(folder: Path) -> None:
    elsewhere(folder, "../outside.onnx")


def anywhere(folder: Path) -> None:
    elsewhere(folder, str(folder.parent / "outside.onnx"))


def by_a_link(folder: Path) -> None:
    (folder / "link.onnx").symlink_to("../outside.onnx")
    elsewhere(folder, "link.onnx")


def signed(folder: Path, do: Callable[[onnx.ModelProto], object]) -> None:
    """Change the teacher's graph, and the manifest with it."""
    model = onnx.load(folder / "teacher.fp32.onnx")
    do(model)
    (folder / "teacher.fp32.onnx").write_bytes(model.SerializeToString())
    sign(folder, "teacher.fp32.onnx")


def truncated_and_signed(folder: Path) -> None:
    truncated(folder)
    sign(folder, "teacher.fp32.onnx")


def empty_and_signed(folder: Path) -> None:
    (folder / "teacher.fp32.onnx").write_bytes(b"")
    sign(folder, "teacher.fp32.onnx")


def external_data(folder: Path) -> None:
    def move(model: onnx.ModelProto) -> None:
        weights = model.graph.initializer[0]
        (folder.parent / "weights.bin").write_bytes(weights.raw_data)
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value="../weights.bin")

    signed(folder, move)


def custom_operator(folder: Path) -> None:
    signed(folder, lambda model: setattr(model.graph.node[0], "domain", "com.example"))


def unknown_operator(folder: Path) -> None:
    signed(folder, lambda model: setattr(model.graph.node[0], "op_type", "Casted"))


def short_weights(folder: Path) -> None:
    signed(folder, lambda model: setattr(model.graph.initializer[0], "raw_data", b"short"))


def other_opset(folder: Path) -> None:
    change(folder, opset=21)


def other_output(folder: Path) -> None:
    signed(folder, lambda model: setattr(model.graph.output[0], "name", "probabilities"))


def more_in_float(folder: Path) -> None:
    files = json.loads((folder / "manifest.json").read_text())["files"]
    change(folder, files=[file | {"float_nodes": None} for file in files])


def refused_by_the_gate(folder: Path) -> None:
    change(folder, gates=[GATE | {"passed": False, "reason": "teacher (teacher): int8 drops by 10.00 points"}])


def never_judged(folder: Path) -> None:
    change(folder, gates=json.loads((folder / "manifest.json").read_text())["gates"][:2])


def no_accuracy(folder: Path) -> None:
    change(folder, accuracy=[])


def images_that_are_none(folder: Path) -> None:
    change(folder, validation=[0, N])


TEACHER = r"teacher\.fp32\.onnx"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_manifest, r"copied is no export: it has no manifest\.json"),
        (no_json, r"manifest\.json cannot be read: Expecting value"),
        (a_list, r"manifest\.json is damaged: expected a JSON object, found list"),
        (other_shape, r"manifest\.json is damaged: files: did not expect a mapping"),
        (newer_format, r"manifest\.json: expected format 1, found 2\. Use the kdedge that wrote it\."),
        (no_files, "manifest: the export has no files"),
        (missing, f"{TEACHER} is missing, though the manifest lists it"),
        (truncated, rf"{TEACHER} was changed: the manifest says 31,\d\d\d bytes, the file has 1,000"),
        (flipped, f"{TEACHER} was changed: the manifest says SHA-256 [0-9a-f]+, the file has [0-9a-f]+"),
        (beside_the_folder, r"'\.\./outside\.onnx' leads out of"),
        (anywhere, r"/outside\.onnx' leads out of"),
        (by_a_link, r"'link\.onnx' leads out of"),
        (truncated_and_signed, f"{TEACHER} is no ONNX file, or a damaged one: "),
        (empty_and_signed, f"{TEACHER}: expected opset 20, as the manifest says, found none"),
        (external_data, f"{TEACHER}: its tensor 'weights' is in another file"),
        (custom_operator, rf"{TEACHER}: its operator 'com\.example\.Flatten' is not one of ONNX's own"),
        (unknown_operator, rf"runner: {TEACHER} cannot be loaded: .*Casted"),
        (short_weights, f"runner: {TEACHER} cannot be loaded: "),
        (other_opset, f"{TEACHER}: expected opset 21, as the manifest says, found 20"),
        (other_output, rf"{TEACHER}: expected the outputs logits float32 .*, found probabilities float32"),
        (
            more_in_float,
            r"head\.int8\.onnx: expected no node in float, as .*, found product \(MatMul\) with onnxruntime",
        ),
        (refused_by_the_gate, r"its export was refused: teacher \(teacher\): int8 drops by 10\.00 points"),
        (never_judged, r"manifest: students head int8 was never held against float32 by a gate\. Export again"),
        (no_accuracy, "manifest: teacher teacher fp32: there is no accuracy on the 200 validation images"),
        (images_that_are_none, "manifest: validation: expected numbers from 0 to 399, given 0 to 400"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_bad_folder_is_an_error_in_words(folder: Path, data: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(folder)
    with pytest.raises(PackageError, match=said) as caught:
        verify(folder, data_dir=data)
    assert str(caught.value) == "\n".join(caught.value.problems)


def test_a_step_tells_every_problem_at_once(folder: Path) -> None:
    flipped(folder)
    (folder / "head.int8.onnx").unlink()
    (folder / "head.fp32.onnx").write_bytes(b"")
    with pytest.raises(PackageError) as caught:
        verify(folder)
    told = [" ".join(problem.removeprefix(f"{folder}/").split()[:3]) for problem in caught.value.problems]
    assert told == ["teacher.fp32.onnx was changed:", "head.fp32.onnx was changed:", "head.int8.onnx is missing,"]


def test_nothing_is_parsed_or_run_before_every_hash_was_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    parse = onnx.load_model_from_string
    monkeypatch.setattr(onnx, "load_model_from_string", lambda content: used.append("parsed") or parse(content))
    monkeypatch.setitem(DEVICES, "cpu", lambda job, files: used.append("run") or {})
    last = folder / "students.1.int8.onnx"
    whole = last.read_bytes()
    last.write_bytes(whole[:-1])
    with pytest.raises(PackageError, match=r"students\.1\.int8\.onnx was changed"):
        verify(folder)
    assert used == []
    last.write_bytes(whole[:1000])
    sign(folder, last.name)
    with pytest.raises(PackageError, match=r"students\.1\.int8\.onnx is no ONNX file"):
        verify(folder)
    assert used == ["parsed"] * 10


def test_a_file_that_kills_onnxruntime_kills_the_runner_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "RUNNER", folder.parent / "runner.py")
    local.RUNNER.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(PackageError, match=r"fuse job of 10 files .* was killed by signal 11"):
        verify(folder)


# Anything else


def outcome(folder: Path, data: Path) -> str:
    """What `verify` says of the folder; any other error than its own is the test's failure."""
    try:
        verify(folder, data_dir=data)
    except PackageError as error:
        assert all(error.problems)
        return "bad"
    except DataError:
        return "other data"
    return "good"


def spoiled(content: bytes, random: np.random.Generator) -> bytes:
    """The bytes with some flipped, cut off, left out, doubled or put in."""
    place, length = int(random.integers(len(content))), int(random.integers(1, 20))
    noise = random.integers(0, 256, length, np.uint8).tobytes()
    return [
        content[:place] + bytes([content[place] ^ 1 << int(random.integers(8))]) + content[place + 1 :],
        content[:place],
        content[:place] + content[place + length :],
        content[: place + length] + content[place:],
        content[:place] + noise + content[place:],
        content[:place] + noise + content[place + length :],
    ][int(random.integers(6))]


def test_no_byte_of_any_file_can_change(
    folder: Path, data: Path, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a network none at all; of the manifest none without that it is told, or is of no matter."""
    monkeypatch.setitem(DEVICES, "cpu", lambda job, files: answers[job["task"]])
    assert outcome(folder, data) == "good"
    random = np.random.default_rng(0)
    paths = sorted(folder.iterdir())
    for _ in range(20):
        for path in paths:
            whole = path.read_bytes()
            path.write_bytes(changed := spoiled(whole, random))
            said = outcome(folder, data)
            assert path.name == "manifest.json" or changed == whole or said == "bad", path
            path.write_bytes(whole)


def test_no_value_of_the_manifest_is_a_crash(
    folder: Path, data: Path, answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any value in it becomes anything else; `outcome` lets no error through but kdedge's own."""
    monkeypatch.setitem(DEVICES, "cpu", lambda job, files: answers[job["task"]])
    document = json.loads((folder / "manifest.json").read_text())

    def places(value: Any) -> list[tuple[Any, Any]]:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]

    random, all_places, said = np.random.default_rng(2), places(document), []
    for number in range(200):
        inside, key = all_places[random.integers(len(all_places))]
        before, inside[key] = inside[key], WEIRD[number % len(WEIRD)]
        (folder / "manifest.json").write_text(json.dumps(document))
        said.append(outcome(folder, data))
        inside[key] = before
    assert {"good", "bad"} <= set(said)


def test_no_network_that_the_manifest_vouches_for_is_a_crash(folder: Path, data: Path) -> None:
    """Changed and signed anew, so that it is parsed, and where it still is a graph, loaded and run."""
    files = json.loads((folder / "manifest.json").read_text())["files"]
    change(folder, files=[file for file in files if file["role"] != "merged" and file["precision"] == "fp32"])
    path = folder / "head.fp32.onnx"
    whole, random = path.read_bytes(), np.random.default_rng(1)
    said = []
    for _ in range(24):
        path.write_bytes(spoiled(whole, random))
        sign(folder, path.name)
        said.append(outcome(folder, data))
    assert {"good", "bad"} <= set(said)


# The command


def kdedge(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["verify", *map(str, arguments)])


def test_the_command_prints_a_table_and_what_was_checked(folder: Path, data: Path) -> None:
    done = kdedge(folder, "--data-dir", data)
    lines = done.stdout.splitlines()
    assert (done.exit_code, len(lines)) == (0, 13)
    assert lines[0].split() == ["file", "kB", "float", "nodes", "manifest", "%", "here", "%"]
    assert lines[6].split() == ["teacher.int8.onnx", "32", "1", "90.00", "90.00"]
    assert lines[-1].startswith("- Their accuracy on 200 validation images")


def test_the_document_says_whether_all_is_well(folder: Path) -> None:
    document = json.loads(kdedge(folder, "--json").stdout)
    assert (document["ok"], document["problems"], document["recipe"]) == (True, [], "tiny")
    assert list(document["files"][0]) == [
        *("path", "network", "role", "precision", "bytes", "float_nodes", "recorded_accuracy", "accuracy"),
    ]
    flipped(folder)
    done = kdedge(folder, "--json")
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert document.keys() == {"folder", "ok", "problems"} and not document["ok"]
    assert done.stderr.splitlines()[-1] == f"Error: {document['problems'][0]}"


def test_the_newest_run_is_verified_where_none_is_named(tmp_path: Path, data: Path) -> None:
    runs = tmp_path / "runs"
    first, second = (write_run(runs / "table" / name, data).path for name in ("a", "b"))
    (first / "export" / "head.fp32.onnx").unlink()
    done = kdedge("--runs", runs)
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1].startswith(f"Error: {first / 'export' / 'head.fp32.onnx'} is missing")
    assert f"- The 10 files in {second / 'export'} are those of its manifest" in done.stdout


def test_a_folder_that_is_neither_is_named(tmp_path: Path) -> None:
    done = kdedge(tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "is no run, " in done.stderr and "Or name an export's folder, which holds its manifest.json" in done.stderr
