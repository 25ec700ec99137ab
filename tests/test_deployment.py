"""The story of `export` on tiny runs: which files, what the manifest says of them, and what is refused."""

import json
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from tiny_export import write_data

from exporters.calibration import Calibration, ranges
from exporters.int8 import quantize
from kdedge.benchmark import bench
from kdedge.data.load import load_recorded
from kdedge.deployment import export, hold_the_gates, rows_to_print
from kdedge.devices import here
from kdedge.distillation import distill
from kdedge.errors import DataError, GateError, KdedgeError, RunError
from kdedge.manifest import GateResult, Manifest
from kdedge.pieces import quantizable, roles
from kdedge.recipe import Int8
from kdedge.recipe_reader import parse_recipe, resolved_recipe
from kdedge.store import CPU_CLASSES, MEASUREMENTS, Run, load_tensors, open_run, sha256
from kdedge.verification import verify

GROUP = """
name: group
data: {name: fashion-mnist, validation: 200, calibration: 40}
networks:
  teacher: {model: mlp-256, fit: {epochs: 1}}
  students:
    model: tcn-student-4
    count: 4
    learns: [{from: teacher, loss: mse}]
    fit: {epochs: 1}
    head: {from: teacher, fine_tune_epochs: 1}
deploy: {int8: {max_drop_points: 100}}
"""
ALONE = """
name: alone
data: {name: fashion-mnist, validation: 200, calibration: 40}
networks: {only: {model: mlp-8, fit: {epochs: 1}}}
bench: {rounds: 1, seconds: 0.01}
deploy: {int8: {max_drop_points: 0}}
"""
PIECES = [
    "teacher",
    "students.0",
    "students.1",
    "students.2",
    "students.3",
    "students.head",
    "students.merged",
    "students.plain",
]
# 784-256 and its head; C32-C8-M-D16-D64; the head of 256 (Malik et al. 2021, Table 6)
PARAMETERS = {"teacher": 785 * 256 + 2570, "member": 22_168, "head": 2_570, "merged": 91_242, "plain": 91_242}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 400)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs that nobody changes."""
    folder = tmp_path_factory.mktemp("runs")
    for text in (GROUP, ALONE):
        distill(parse_recipe(text), runs=folder, device="cpu", data_dir=data)
    return folder


@pytest.fixture(scope="module")
def exported(runs: Path, data: Path) -> tuple[Path, Manifest]:
    """The folder and the manifest of an export of the group that nobody changes."""
    return runs / "group" / "export", export(runs / "group", int8=True, data_dir=data)


@pytest.fixture
def alone(runs: Path, tmp_path: Path) -> Run:
    """A run to change: one small network."""
    return open_run(Path(shutil.copytree(runs / "alone", tmp_path / "alone")))


def snapshot(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


def test_exactly_these_files_are_written(exported: tuple[Path, Manifest]) -> None:
    expected = [f"{piece}.{precision}.onnx" for piece in PIECES for precision in ("fp32", "int8")]
    folder, manifest = exported
    assert sorted(path.name for path in folder.iterdir()) == sorted([*expected, "manifest.json"])
    assert [file.path for file in manifest.files] == expected
    assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "export", "run.json", "stages", "targets"]


def test_the_manifest_has_the_fields_that_other_tools_read(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    document = json.loads((folder / "manifest.json").read_text())
    assert document == manifest.model_dump(mode="json")
    assert list(document)[:3] == ["format", "recipe", "files"]
    assert (document["format"], document["recipe"]) == (1, "group")
    for file in document["files"]:
        assert list(file) == [
            *("network", "role", "precision", "path", "sha256", "bytes", "parameters", "weight_bits", "opset"),
            *("inputs", "outputs"),
            *("difference_to_torch", "agreement_with_torch", "float_nodes", "repair"),
        ]
        assert (folder / file["path"]).stat().st_size == file["bytes"]
        assert sha256(folder / file["path"]) == file["sha256"]
        assert file["precision"] in file["path"]
    roles = {(file["network"], file["role"]) for file in document["files"]}
    members = {(f"students.{number}", "member") for number in range(4)}
    assert roles == {
        ("teacher", "teacher"),
        *(("students", role) for role in ("head", "merged", "plain")),
        *members,
    }


def test_inputs_and_outputs_are_those_of_the_files(exported: tuple[Path, Manifest]) -> None:
    folder, manifest = exported
    image = {"name": "image", "dtype": "uint8", "shape": ["batch", 1, 28, 28]}
    for file in manifest.files:
        given = image if file.role != "head" else {"name": "dense", "dtype": "float32", "shape": ["batch", 256]}
        name, width = ("dense", 64) if file.role == "member" else ("logits", 10)
        assert [tensor.model_dump() for tensor in file.inputs] == [given]
        found = [tensor.model_dump() for tensor in file.outputs]
        assert found == [{"name": name, "dtype": "float32", "shape": ["batch", width]}]
        graph = onnx.load(folder / file.path)
        onnx.checker.check_model(graph, full_check=True)
        assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", manifest.opset)] == [("", 20)]
        assert [value.name for value in graph.graph.input] == [given["name"]]


def test_parameters_are_counted_once_and_add_up(exported: tuple[Path, Manifest]) -> None:
    for precision in ("fp32", "int8"):
        files = [file for file in exported[1].files if file.precision == precision]
        assert {file.role: file.parameters for file in files} == PARAMETERS
        parts = [file.parameters for file in files if file.role in ("member", "head")]
        assert len(parts) == 5 and sum(parts) == 91_242


BRANCHES = [*["Conv", "Conv", "Gemm", "Gemm"] * 4, "Concat", "Gemm"]


@pytest.mark.parametrize(
    ("file", "expected", "width"),
    [
        ("plain.fp32", BRANCHES, 256),
        ("plain.int8", BRANCHES, 256),
        ("merged.fp32", [*["Conv", "Conv", "Gemm"] * 4, "Concat", "Gemm"], 64),
        ("merged.int8", ["Conv", "Conv", "Conv", "Gemm"], 64),
    ],
)
def test_a_group_is_in_one_graph_as_it_was_trained_and_as_is_fast_in_each_precision(
    exported: tuple[Path, Manifest], file: str, expected: list[str], width: int
) -> None:
    """As is fast, the last linear layers are in the head; in int8 two convolutions and the hidden layer are each one."""
    graph = onnx.load(exported[0] / f"students.{file}.onnx").graph
    found = Counter(node.op_type for node in graph.node if node.op_type in ("Conv", "Gemm", "Split", "Concat"))
    assert found == Counter(expected)  # onnxruntime sorts the nodes of int8 in an order of its own
    assert [10, width] in [list(value.dims) for value in graph.initializer]


def test_what_was_measured_is_told(exported: tuple[Path, Manifest], runs: Path) -> None:
    _, manifest = exported
    run = open_run(runs / "group")
    assert manifest.calibration == run.data["calibration"] and len(manifest.calibration) == 40
    assert manifest.data and manifest.data.model_dump().items() <= ({"as": None} | run.data).items()
    assert manifest.validation == run.data["validation"] and len(manifest.validation) == 200
    assert manifest.stages == {stage.name: stage.key for stage in run.stages}
    assert {"torch", "onnx", "onnxruntime", "onnxscript", "numpy", "kdedge", "python"} <= set(manifest.versions)
    for file in manifest.files:
        if file.precision == "fp32":
            assert file.difference_to_torch is not None and 0 <= file.difference_to_torch < 1e-3
        else:
            assert file.float_nodes == []
    chains = {(row.network, row.role, row.precision, row.split, row.n) for row in manifest.accuracy}
    places = [("teacher", "teacher"), *(("students", role) for role in ("head", "merged", "plain"))]
    assert chains == {(*place, precision, "validation", 200) for place in places for precision in ("fp32", "int8")}
    assert [(gate.network, gate.role, gate.passed) for gate in manifest.gates] == [(*p, True) for p in places]


def test_a_copy_of_the_export_is_verified_with_the_figures_of_the_export(
    exported: tuple[Path, Manifest], data: Path, tmp_path: Path
) -> None:
    found = verify(shutil.copytree(exported[0], tmp_path / "copy"), data_dir=data)
    assert [file.path for file in found.files] == [file.path for file in exported[1].files]
    assert all(file.accuracy == file.recorded_accuracy for file in found.files)
    assert [file.accuracy is None for file in found.files if file.role == "member"] == [True] * 8
    assert found.notes[1].endswith("on 200 validation images is that of the manifest, but for 1 at most.")


def test_the_table_has_a_line_for_each_file(exported: tuple[Path, Manifest]) -> None:
    header, rows = rows_to_print(exported[1])
    assert [row[0] for row in rows] == [file.path for file in exported[1].files]
    assert {len(row) for row in rows} == {len(header)}
    assert rows[0][1] == "203,530"


def test_a_file_takes_the_images_that_its_network_was_trained_on(data: Path, tmp_path: Path) -> None:
    text = (
        ALONE.replace("fashion-mnist,", "fashion-mnist, as: rgb32,")
        .replace("mlp-8", "lenet5")
        .replace(": 0}", ": 100}")
    )
    run = distill(parse_recipe(text), runs=tmp_path, device="cpu", data_dir=data)
    for file in export(run, data_dir=data).files:
        assert file.inputs[0].model_dump() == {"name": "image", "dtype": "uint8", "shape": ["batch", 3, 32, 32]}
    measured = bench(run, data_dir=data).validation.rows
    assert [row.n for row in measured] == [400, 400]  # of the test split, which has to be 3x32x32 as well


def test_a_file_looks_at_the_pixels_that_its_network_saw_in_training(data: Path, tmp_path: Path) -> None:
    text = ALONE.replace("fit: {epochs: 1}", "fit: {epochs: 1}, view: {centre: 20}").replace(": 0}", ": 100}")
    run = distill(parse_recipe(text), runs=tmp_path, device="cpu", data_dir=data)
    manifest = export(run, data_dir=data)
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28), np.uint8)
    other_border, other_middle = np.copy(image), np.copy(image)
    other_border[:, :, :4], other_border[..., 24:], other_middle[:, :, 12:16, 12:16] = 0, 255, 0
    for file in manifest.files:
        session = onnxruntime.InferenceSession(run.path / "export" / file.path, providers=["CPUExecutionProvider"])
        given, border, middle = (session.run(None, {"image": one})[0] for one in (image, other_border, other_middle))
        assert np.array_equal(given, border) and not np.array_equal(given, middle)


def test_what_was_trained_quantized_brings_its_scales(data: Path, tmp_path: Path) -> None:
    """One network starts anew, the other with the weights of a finished one; both differ from what calibration makes."""
    more = (
        "fine: {model: mlp-8, fit: {epochs: 1, lr: 1.0e-5}, quantize: {from: only}}, anew: {model: mlp-8, quantize: {}}"
    )
    text = ALONE.replace("points: 0", "points: 100").replace("{only:", f"{{{more}, only:")
    run = distill(parse_recipe(text), runs=tmp_path, device="cpu", data_dir=data)
    only, fine = (run.stage(f"fit {name}") / "weights.safetensors" for name in ("only", "fine"))
    before, after = load_tensors(only), load_tensors(fine)
    assert set(after) - set(before) == {f"head.given.{name}" for name in ("low", "high", "steps")}
    assert all(0 < (before[name] - after[name]).abs().max() < 1e-3 for name in before)

    manifest = export(run, data_dir=data)
    int8 = {file.network: file for file in manifest.files if file.precision == "int8"}
    assert int8["only"].agreement_with_torch is None and int8["only"].difference_to_torch is None
    for name in ("fine", "anew"):
        assert int8[name].agreement_with_torch == 100 and int8[name].float_nodes == []
        assert 0 <= int8[name].difference_to_torch < 0.1  # type: ignore[operator]
    assert [gate.network for gate in manifest.gates] == ["only", "fine", "anew"]
    ranges = onnx.load(run.path / "export" / "fine.merged.int8.onnx").graph.initializer
    high, low = (float(after[f"head.given.{name}"]) for name in ("high", "low"))
    scales = [numpy_helper.to_array(value) for value in ranges]
    assert any(value.shape == () and np.isclose(value, (high - low) / 255) for value in scales)


@pytest.mark.parametrize(("bits", "opset"), [(4, 21), (2, 25)])
def test_a_group_of_fewer_bits_is_exported_and_verified(bits: int, opset: int, data: Path, tmp_path: Path) -> None:
    text = GROUP.replace("fine_tune_epochs: 1}", f"fine_tune_epochs: 1}}\n    quantize: {{weights: {bits}}}")
    run = distill(parse_recipe(text), runs=tmp_path, device="cpu", data_dir=data)
    manifest = export(run, data_dir=data)
    files = {(file.role, file.precision): file for file in manifest.files}
    assert {place: (file.weight_bits, file.opset) for place, file in files.items()} == {
        **{(role, "fp32"): (32, 20) for role in ("teacher", "member", "head", "merged")},
        **{(role, "int8"): (8, 20) for role in ("teacher", "head")},
        **{(role, "int8"): (bits, opset) for role in ("member", "merged")},
    }
    merged = files["merged", "int8"]
    assert merged.float_nodes == [] and merged.agreement_with_torch is not None and merged.agreement_with_torch >= 99
    assert f"opset 20 or {opset}, inputs" in verify(run.path / "export", data_dir=data).notes[0]


def test_each_member_that_was_trained_quantized_has_scales_of_its_own(data: Path, tmp_path: Path) -> None:
    text = GROUP.replace("fine_tune_epochs: 1}", "fine_tune_epochs: 1}\n    quantize: {}")
    run = distill(parse_recipe(text), runs=tmp_path, device="cpu", data_dir=data)
    manifest = export(run, data_dir=data)
    merged = next(file for file in manifest.files if (file.role, file.precision) == ("merged", "int8"))
    assert merged.agreement_with_torch is not None and merged.agreement_with_torch >= 99
    scales = []
    for member in range(4):
        graph = onnx.load(run.path / "export" / f"students.{member}.int8.onnx").graph
        known = {value.name: numpy_helper.to_array(value) for value in graph.initializer}
        steps = {node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
        scales.append([float(known[name]) for name in sorted(steps)])
    assert all(len(one) == 3 for one in scales) and len({one[-1] for one in scales}) == 4


def test_exporting_again_gives_the_same_bytes(alone: Run, data: Path) -> None:
    alone.recipe["deploy"]["int8"]["max_drop_points"] = 100
    first = export(alone, data_dir=data)
    second = export(alone, data_dir=data)
    assert first.files == second.files


def test_the_recipe_says_how_ranges_are_found(alone: Run, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("kdedge.pieces.ranges", lambda *given: asked.append(given[2]) or ranges(*given))
    alone.recipe["deploy"]["int8"] = {"max_drop_points": 100, "calibration": "mse"}
    manifest = export(alone, data_dir=data)
    assert asked == ["mse"] == [manifest.calibrated_by]
    assert Int8.model_fields["calibration"].annotation == Calibration


def test_what_is_diagnosed_is_what_is_exported(exported: tuple[Path, Manifest], runs: Path, data: Path) -> None:
    run = open_run(runs / "group")
    recipe = resolved_recipe(run.recipe, "run.json")
    graph, found, pixels = quantizable(run, recipe, load_recorded(run.data, data), "students", "merged")
    made = quantize(graph, found, pixels, (1, 28, 28)).SerializeToString(deterministic=True)
    assert made == (exported[0] / "students.merged.int8.onnx").read_bytes()


def test_a_lost_gate_leaves_the_files_and_says_why(alone: Run, data: Path) -> None:
    # With 0 points allowed not even equal files pass: on 200 images nobody can know that nothing was lost.
    with pytest.raises(GateError) as caught:
        export(alone.path, int8=True, data_dir=data)
    message = str(caught.value).splitlines()
    assert message[0] == "The int8 export could not be validated:"
    assert (
        message[1].startswith("  only (teacher): int8 drops by ")
        and "; 0 are allowed; 200 images cannot show less than 0.97, " in message[1]
    )
    assert message[-1] == f"The files are in {alone.path / 'export'}; ship the fp32 files."
    assert caught.value.exit_code == 3
    left = sorted(path.name for path in (alone.path / "export").iterdir())
    assert left == ["manifest.json", "only.fp32.onnx", "only.int8.onnx"]
    (verdict,) = json.loads((alone.path / "export" / "manifest.json").read_text())["gates"]
    assert verdict["passed"] is False
    assert verdict["upper95_points"] > 0 == verdict["max_drop_points"]


LOST = {"drop_points": 2.0, "n": 5000}
UNTOLD = {"drop_points": 0.1, "n": 200}  # which cannot show less than 0.97
NOT_RUN = {"drop_points": None, "n": 0}
LONGER, REPAIR, CLASSES = (
    ", or train longer and export again",
    ", or export again with --repair",
    ", or change deploy.cpu_",
)


@pytest.mark.parametrize(
    ("verdicts", "repair", "trained_quantized", "first", "advice"),
    [
        ([LOST], False, False, "lost too much accuracy", LONGER + REPAIR + "."),
        ([LOST], True, False, "lost too much accuracy", LONGER + "."),
        ([LOST], False, True, "lost too much accuracy", LONGER + "."),
        ([LOST | {"n": 200}], False, False, "lost too much accuracy", LONGER + "."),
        ([UNTOLD], False, False, "could not be validated", "."),
        ([NOT_RUN], False, False, "could not be validated", CLASSES),
        ([LOST, NOT_RUN], False, False, "lost too much accuracy", LONGER + REPAIR + CLASSES),
    ],
)
def test_a_refusal_advises_what_can_help(
    verdicts: list[dict[str, Any]],
    repair: bool,
    trained_quantized: bool,
    first: str,
    advice: str,
    exported: tuple[Path, Manifest],
) -> None:
    known = {"network": "students", "role": "merged", "upper95_points": 3.0, "max_drop_points": 0.5, "passed": False}
    known |= {"only_fp32": 0, "only_int8": 0, "reason": "because"}
    manifest = exported[1].model_copy(deep=True)
    manifest.gates = [GateResult.model_validate(known | one | {"cpu_class": str(one)}) for one in verdicts]
    for file in manifest.files:
        file.agreement_with_torch = 100.0 if trained_quantized and file.precision == "int8" else None
    with pytest.raises(GateError) as caught:
        hold_the_gates(manifest, Path("there"), repair)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"The int8 export {first}:" and lines[1:-1] == ["  because"] * len(verdicts)
    assert lines[-1].startswith(f"The files are in there; ship the fp32 files{advice}")


def test_a_class_that_cannot_be_run_is_not_said_to_have_lost(
    alone: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where there is no Arm Python
    other = "x86-vnni" if str(here()["cpu_class"]).startswith("arm64") else "arm64"
    alone.recipe["deploy"] = {"int8": {"max_drop_points": 100}, "cpu_classes": [other]}
    with pytest.raises(GateError) as caught:
        export(alone, data_dir=data)
    first, reason, advice = str(caught.value).splitlines()
    assert first == "The int8 export could not be validated:"
    assert advice.endswith(
        "; ship the fp32 files, or change deploy.cpu_classes: `kdedge devices` says which of them can be run here, and how."
    )
    assert reason.startswith(f"  only (teacher) on {other}: not validated: ")


def test_without_int8_only_float_files_are_written_and_no_gate_is_asked(alone: Run, data: Path) -> None:
    manifest = export(alone, int8=False, data_dir=data)
    assert sorted(path.name for path in (alone.path / "export").iterdir()) == ["manifest.json", "only.fp32.onnx"]
    assert (manifest.gates, manifest.calibration) == ([], [])
    assert [row.precision for row in manifest.accuracy] == ["fp32"]


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files of more than 20 kB cannot be written, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_export_before_as_it_was(
    data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    text = ALONE.replace("{only: ", "{small: {model: mlp-2, fit: {epochs: 1}}, large: ").replace("mlp-8", "mlp-64")
    run = distill(parse_recipe(text), runs=tmp_path, device="cpu", data_dir=data)
    (run.path / "export").mkdir()
    for name in ("small.merged.fp32.onnx", "manifest.json"):
        (run.path / "export" / name).write_text("of the export before")
    before = snapshot(run.path)
    request.getfixturevalue("full_disk")
    with pytest.raises(RunError, match=r"large\.merged\.fp32\.onnx cannot be written: File too large\. .+ kept"):
        export(run, int8=False, data_dir=data)
    assert snapshot(run.path) == before
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "export", "run.json", "stages"]


def damage(run: Run, how: str) -> None:
    (stage,) = (run.path / "stages").iterdir()
    weights = stage / "weights.safetensors"
    if how == "unfinished":
        shutil.rmtree(stage)
    elif how == "no weights":
        weights.unlink()
    elif how == "changed weights":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    elif how == "changed recipe":
        run.recipe["networks"]["only"]["model"] = "mlp-9"
        run.write()
    elif how == "other data":
        run.data["fingerprint"] = "0" * 64
        run.write()
    else:
        (run.path / "run.json").write_text(how)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("unfinished", RunError, r"alone: stage 'fit only' is not finished. Run `kdedge distill` again"),
        ("no weights", RunError, r"weights\.safetensors is missing"),
        ("changed weights", RunError, r"weights\.safetensors was changed: expected SHA-256 \w{64}, found \w{64}"),
        ("changed recipe", RunError, r"weights\.safetensors does not fit network 'only'"),
        ("other data", DataError, r"is not the data of this run: expected fashion-mnist with fingerprint 0000"),
        ("{", RunError, r"run\.json cannot be read"),
        ('{"format": 1}', RunError, r"run\.json is damaged"),
    ],
)
def test_what_is_no_finished_run_is_refused_and_nothing_is_written(
    alone: Run, data: Path, how: str, error: type[KdedgeError], message: str
) -> None:
    damage(alone, how)
    with pytest.raises(error, match=message):
        export(alone.path, data_dir=data)
    assert not (alone.path / "export").exists()


def test_measurements_of_the_export_before_are_removed(alone: Run, data: Path) -> None:
    measured = [alone.path / name for name in (*MEASUREMENTS, CPU_CLASSES)]
    for path in measured:
        path.write_text("of the files that were there before")
    export(alone.path, int8=False, data_dir=data)
    assert not any(path.exists() for path in measured)


@pytest.mark.parametrize("name", ["", "nowhere"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match=r"is not a run: it has no run\.json\. Make one with `kdedge distill RECIPE`\."):
        export(tmp_path / name)


def network(**fields: Any) -> dict[str, Any]:
    return {"model": "mlp-8", **fields}


KD = {"loss": "kd"}


@pytest.mark.parametrize(
    ("networks", "expected"),
    [
        ({"only": network()}, ["teacher"]),
        ({"teacher": network(), "student": network(learns=[{"from": "teacher", **KD}])}, ["teacher", "merged"]),
        (
            {
                "teacher": network(),
                "assistant": network(learns=[{"from": "teacher", **KD}]),
                "student": network(learns=[{"from": "assistant", **KD}]),
            },
            ["teacher", "teacher", "merged"],
        ),
        (
            {"teacher": network(), "fine": network(quantize={"from": "teacher"})},
            ["merged", "merged"],  # weights to start with are no lesson
        ),
        ({"one": network(), "other": network()}, ["merged", "merged"]),
        (
            {"one": network(), "other": network(), "both": {"members": ["one", "other"], "merge": "sum"}},
            ["merged", "merged", "merged"],
        ),
    ],
    ids=["alone", "kd", "assistant", "start", "independent", "members"],
)
def test_whoever_teaches_is_a_teacher_and_the_rest_is_shipped(networks: dict[str, Any], expected: list[str]) -> None:
    recipe = resolved_recipe({"name": "r", "data": {"name": "mnist"}, "networks": networks})
    assert roles(recipe) == list(zip(networks, expected, strict=True))


def test_the_first_teacher_is_who_taught_all_others() -> None:
    learning = {
        name: network(learns=[{"from": of, **KD}]) for name, of in (("student", "assistant"), ("assistant", "big"))
    }
    recipe = resolved_recipe({"name": "r", "data": {"name": "mnist"}, "networks": learning | {"big": network()}})
    assert roles(recipe) == [("big", "teacher"), ("assistant", "teacher"), ("student", "merged")]


def test_what_learns_the_rest_is_shipped_in_what_it_completes() -> None:
    rest = network(learns=[{"from": "teacher", "minus": "student", "loss": "mse"}])
    pair = {"members": ["student", "assistant"], "merge": "sum"}
    networks = {"teacher": network(), "student": network(), "assistant": rest, "pair": pair}
    recipe = resolved_recipe({"name": "r", "data": {"name": "mnist"}, "networks": networks})
    assert roles(recipe) == [("teacher", "teacher"), ("student", "teacher"), ("pair", "merged")]


def test_a_single_student_is_shipped_as_one_file_a_precision(data: Path, tmp_path: Path) -> None:
    text = ALONE.replace(
        "{only:", "{student: {model: mlp-4, learns: [{from: teacher, loss: kd}], fit: {epochs: 1}}, teacher:"
    )
    run = distill(parse_recipe(text), runs=tmp_path, device="cpu", data_dir=data)
    manifest = export(run, int8=False, data_dir=data)
    assert [(file.network, file.role, file.path, file.parameters) for file in manifest.files] == [
        ("teacher", "teacher", "teacher.fp32.onnx", 785 * 8 + 90),
        ("student", "merged", "student.merged.fp32.onnx", 785 * 4 + 50),
    ]
