"""`export --repair`, on networks of which it is known what int8 ruins, so that it is known what has to stay in float."""

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny_export import GATE, Notes, recorded_data, write_data, write_run
from torch import nn

from kdedge import devices
from kdedge.cli import main
from kdedge.data.batches import normalise
from kdedge.data.catalog import DATASETS
from kdedge.data.load import load
from kdedge.deployment import export
from kdedge.devices import emulated, local
from kdedge.errors import GateError
from kdedge.gates import Court
from kdedge.manifest import GateResult, Manifest, Repaired, read_manifest
from kdedge.models.network import Network
from kdedge.pieces import Piece
from kdedge.recipe import Bench, Deploy
from kdedge.repair import Repairer, fewest, sentences
from kdedge.store import Run, open_run, sha256
from kdedge.validate import Known
from kdedge.verification import verify

N = 200
FASHION = DATASETS["fashion-mnist"]
WIDTH = 20
BLACK = float(normalise(torch.zeros(1, *FASHION.shape, dtype=torch.uint8), FASHION).max())  # what a network sees of it
KD = {"from": "teacher", "loss": "kd"}
LARGE = 600  # beside it 1 is less than half of 255 steps; with much more, float32 itself would lose the digits of the 1


def member(*ruined: int) -> nn.Sequential:
    """Three layers that hand on the first ten pixels."""
    layers: list[nn.Module] = [nn.Flatten()]
    for number, inputs in enumerate((784, WIDTH, WIDTH)):
        made = linear(inputs, WIDTH)
        made.bias.data[-1] = 1  # so that the next layer's last input is always 1
        layers += [spoilt(made, 1 if number else BLACK) if number in ruined else made, nn.ReLU()]
    return nn.Sequential(*layers)


def linear(inputs: int, outputs: int) -> nn.Linear:
    made = nn.Linear(inputs, outputs)
    for parameter in made.parameters():  # next to nothing: the exporter leaves out zeros, and one of two that are equal
        nn.init.uniform_(parameter, 0, 1e-6)
    made.weight.data[range(10), range(10)] = 1
    return made


def spoilt(made: nn.Linear, given: float) -> nn.Linear:
    """With a weight for its last input, always `given`, that is so large that in int8 all others are 0. What it adds, the
    bias takes away."""
    made.weight.data[:10, -1] += LARGE
    made.bias.data[:10] -= LARGE * given
    return made


def network(*ruined: int) -> Network:
    """The class is the brightest of the first ten pixels, after three layers and a head."""
    head = linear(WIDTH, 10)
    return Network([member(*ruined)], spoilt(head, 1) if 3 in ruined else head, ["mlp-20"]).eval()


def group(*ruined: int) -> Network:
    """Classes 0 to 4 as the first member says, 5 to 9 as the second one, some of whose layers are ruined."""
    head = linear(2 * WIDTH, 10)
    head.weight.data[range(5, 10), range(5, 10)] = 0
    head.weight.data[range(5, 10), range(WIDTH + 5, WIDTH + 10)] = 1
    return Network([member(), member(*ruined)], head, ["mlp-20"] * 2).eval()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", N)


@pytest.fixture
def run_of(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """A finished run of these networks, with a bound that 200 images can keep when nothing is lost."""

    def made(
        int8: dict[str, object] | None = None, fields: dict[str, object] | None = None, **networks: Network
    ) -> Run:
        run = write_run(tmp_path / "tiny", data)
        students = {"model": "mlp-20", "learns": [KD]} | (fields or {})
        run.recipe["networks"] = {"teacher": {"model": "mlp-20"}, "students": students}
        run.recipe["deploy"] = {"int8": {"max_drop_points": 2} | (int8 or {})}
        run.data = recorded_data(load("fashion-mnist", data).fingerprint)
        run.data |= {"validation": list(range(N)), "calibration": list(range(40))}
        run.write()
        monkeypatch.setattr("kdedge.deployment.finished", lambda run, recipe, name: networks[name])
        return open_run(run.path)

    return made


def of(manifest: Manifest, precision: str) -> Collection[str]:
    return {file.path for file in manifest.files if file.precision == precision}


def test_only_the_layer_that_int8_ruins_stays_in_float(run_of: Callable[..., Run], data: Path) -> None:
    run = run_of(teacher=network(), students=network(1))
    with pytest.raises(GateError):
        export(run, data_dir=data)
    before = {path.name: sha256(path) for path in (run.path / "export").glob("*.onnx")}
    assert len(before) == 4 and not [name for name in before if "repaired" in name]

    manifest = export(run, repair=True, data_dir=data)
    assert {file.path: file.sha256 for file in manifest.files if not file.repair}.items() <= before.items()
    assert of(manifest, "int8") == {"teacher.int8.onnx"}
    assert of(manifest, "int8-repaired") == {"students.merged.int8-repaired.onnx"}
    (file,), (one,) = [file for file in manifest.files if file.repair], manifest.repaired
    assert file.repair and file.float_nodes == ["node_linear_1 (Gemm)"] == [f"{file.repair.in_float[0]} (Gemm)"]
    assert len(file.repair.in_float) == 2  # with its activation
    (told,) = one.in_float.items()
    assert told[0] == "linear_1 (Gemm)" and told[1] is not None and told[1] < 10
    assert (one.network, one.role, one.layers, one.bytes) == ("students", "merged", 4, file.bytes)
    assert one.bytes > one.int8_bytes > 0 and one.latency_ms_p50 > 0 and one.int8_latency_ms_p50 > 0
    assert manifest.refused == [] and [file.path] == [path for path in manifest.ships[one.cpu_class] if "rep" in path]
    verdict = manifest.gates[-1]
    assert (verdict.precision, verdict.passed, verdict.drop_points) == ("int8-repaired", True, 0)
    assert verdict.reason.endswith("ranges, and 1 layer in float")
    accuracy = {(row.network, row.precision): row.accuracy for row in manifest.accuracy}
    assert accuracy["students", "int8-repaired"] == accuracy["students", "fp32"] == 100
    assert {path.name for path in (run.path / "export").iterdir()} == {
        "manifest.json",
        *(file.path for file in manifest.files),
    }
    assert verify(run.path / "export", data_dir=data).files[-1].float_nodes == file.float_nodes


def test_of_a_chain_only_the_member_that_needs_it_has_a_layer_in_float(run_of: Callable[..., Run], data: Path) -> None:
    """The merged network is another file and is repaired by itself: two layers of two members are one there. As trained, the
    group need not pass, and its int8 file is gone."""
    run = run_of(fields={"count": 2}, teacher=network(), students=group(1))
    manifest = export(run, repair=True, data_dir=data)
    chain, merged = manifest.repaired
    assert (chain.role, [*chain.in_float], chain.layers) == ("head", ["students.1 linear_1 (Gemm)"], 7)
    assert merged.role == "merged" and len(merged.in_float) == 1
    in_float = {file.path: file.float_nodes for file in manifest.files if file.precision == "int8-repaired"}
    assert in_float.pop("students.merged.int8-repaired.onnx")
    assert in_float == {
        "students.0.int8-repaired.onnx": [],
        "students.1.int8-repaired.onnx": ["node_linear_1 (Gemm)"],
        "students.head.int8-repaired.onnx": [],
    }
    assert manifest.refused == []
    assert [file.path for file in manifest.files if file.role == "plain"] == ["students.plain.fp32.onnx"]
    assert not (run.path / "export" / "students.plain.int8.onnx").exists()


def test_other_ranges_are_tried_before_a_layer_in_float(
    run_of: Callable[..., Run], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is brightest is the rarest of its tensor. Without it, all ten values are the same."""
    monkeypatch.setattr("exporters.calibration.PERCENTILE", 90)
    given = network()
    given.members[0][3].bias.data[:10] += 5  # type: ignore[index, union-attr, operator]
    run = run_of({"calibration": "percentile"}, teacher=network(), students=given)
    manifest = export(run, repair=True, data_dir=data)
    (one,) = [one for one in manifest.repaired if one.network == "students"]
    assert (one.calibrated_by, one.in_float, one.layers) == ("minmax", {}, 4)
    (file,) = [file for file in manifest.files if file.repair and file.network == "students"]
    assert file.float_nodes == [] and file.repair and file.repair.in_float == []
    assert "with minmax ranges and no layer in float" in sentences(manifest)[-2]


def test_a_class_that_is_emulated_judges_the_repair_and_takes_no_time(
    run_of: Callable[..., Run], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "x86-sse" if devices.here()["cpu_class"] != "x86-sse" else "x86-avx2"

    def emulating(job: Any, files: Any) -> dict[str, Any]:
        assert job["task"] == "accuracy"
        answer = local.run(job, files)
        answer["device"]["cpu_class"] = other
        return answer

    monkeypatch.setattr(devices, "EMULATED", {other: emulating})
    monkeypatch.setattr(emulated, "problem", lambda name: None)
    run = run_of(teacher=network(), students=network(1))
    run.recipe["deploy"]["cpu_classes"] = [other]
    manifest = export(run, repair=True, data_dir=data)
    assert manifest.ships == {other: ["teacher.int8.onnx", "students.merged.int8-repaired.onnx"]}
    assert manifest.repaired[0].cpu_class == devices.here()["cpu_class"] != manifest.gates[-1].cpu_class == other


def test_where_one_layer_in_int8_is_too_many_the_network_is_refused(run_of: Callable[..., Run], data: Path) -> None:
    run, notes = run_of(teacher=network(), students=network(0, 1, 2, 3)), Notes()
    with pytest.raises(GateError, match=r"int8-repaired drops by .+ ranges, and 3 layers in float"):
        export(run, repair=True, data_dir=data, progress=notes)
    assert notes.said[-1] == "students (merged) is not repaired: it does not even pass with one layer in int8"
    manifest = read_manifest(run.path / "export")
    assert manifest.repaired == [] and of(manifest, "int8-repaired") == set()
    assert list((run.path / "export").glob("*repaired*")) == []


QUANTIZED = "it was trained quantized, and its scales are its own"
UNKNOWN = "what it lost could not be told: because"


@pytest.mark.parametrize(
    ("bits", "verdict", "why"),
    [
        (8, {}, QUANTIZED),
        (None, {"max_drop_points": 0.5}, UNKNOWN),  # 200 images cannot show less than 0.97
        (None, {"drop_points": None, "n": 0}, UNKNOWN),
    ],
)
def test_what_is_not_repaired(bits: int | None, verdict: dict[str, object], why: str, tmp_path: Path) -> None:
    failed = {"network": "students", "role": "merged", "passed": False, "reason": "because"}
    notes, manifest = (
        Notes(),
        Manifest(recipe="x", files=[], gates=[GateResult.model_validate(GATE | failed | verdict)]),
    )
    nothing = np.zeros(0, np.uint8)
    court = Court(tmp_path, manifest, nothing, nothing, Deploy(), Bench(), Known(), notes)
    pieces = [Piece("students", "merged", network(), "logits", bits=bits)]
    Repairer(pieces, torch.zeros(0), FASHION, None)(court, ("students", "merged"))  # type: ignore[arg-type]
    assert notes.said == [f"students (merged) is not repaired: {why}"]
    assert manifest.files == manifest.repaired == []


def test_the_command_says_what_it_did_and_what_it_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "tiny", write_data(tmp_path / "data", N))
    done = Repaired(
        network="students",
        role="merged",
        form="int8-u8u8",
        calibrated_by="mse",
        in_float={"linear_1 (Gemm)": 9.87, "Split (Split)": None},
        layers=4,
        bytes=85_000,
        int8_bytes=83_000,
        latency_ms_p50=0.3,
        int8_latency_ms_p50=0.2,
        latency_ratio=1.5,
        latency_ratio_ci95=(1.4, 1.6),
        threads=1,
        cpu_class="x86-avx2",
    )
    manifest, asked = read_manifest(run.path / "export").model_copy(update={"repaired": [done]}), []
    monkeypatch.setattr("kdedge.deployment.export", lambda *_, **options: asked.append(options["repair"]) or manifest)
    refused = CliRunner().invoke(main, ["export", str(run.path), "--repair"])
    assert refused.exit_code == 2 and "--repair is of int8 files: kdedge export --int8 --repair" in refused.stderr
    told = CliRunner().invoke(main, ["export", str(run.path), "--int8", "--repair"]).stdout.splitlines()
    assert [line for line in told if line.startswith("- ")] == [
        "- students (merged) passes as int8-u8u8 with mse ranges and 2 of 4 layers in float. Signal over noise of its output "
        "with one of them alone in int8: linear_1 (Gemm) 9.9 dB, Split (Split).",
        "- That takes 0.300 ms against 0.200 of the int8 that failed (1.50 times, 1.40 to 1.60; x86-avx2, threads: 1), in "
        "85 kB against 83.",
    ]
    printed = CliRunner().invoke(main, ["export", str(run.path), "--int8", "--json"]).stdout
    assert json.loads(printed)["repaired"] == [done.model_dump(mode="json")]
    assert asked == [True, False]


@pytest.mark.parametrize(
    ("needed", "expected"),
    [
        ("a", "a"),
        ("c", "c"),
        ("ac", "ac"),
        ("bcd", "bcd"),
        ("abcdefg", "abcdefg"),
        ("fg", "fg"),
        ("h", None),
        ("", "a"),
    ],
)
def test_the_fewest_are_found_and_none_can_be_left_out(needed: str, expected: str | None) -> None:
    """Of a to h, in this order, those pass that hold all that is needed."""
    asked = []
    found = fewest("abcdefgh", lambda some: asked.append(some) or set(needed) <= set(some))
    assert found == (None if expected is None else list(expected))
    assert max(map(len, asked)) < 8 and len(asked) <= 13


def test_of_one_layer_none_is_left_to_quantize() -> None:
    assert fewest("a", lambda some: True) is None
