"""The whole chain on real images, as a user types it: distil, export, measure; then each number is checked.

Real are Fashion-MNIST's own images where they are installed or can be had; a small part of them is enough here.
"""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from numpy.typing import NDArray

from kdedge.data.load import load

RECIPE = Path(__file__).parent.parent / "recipes" / "tcn4.yaml"
TRAIN, TEST, VALIDATION, CALIBRATION = 4000, 1000, 800, 64
SMALLER = [
    f"data.validation={VALIDATION}",
    f"data.calibration={CALIBRATION}",
    "data.limit=1024",
    "deploy.int8.max_drop_points=20",  # what so few images can tell
]
MEMBERS = [f"students.{number}" for number in range(4)]
PLACES = [
    ("teacher", "teacher"),
    *((member, "member") for member in MEMBERS),
    ("students", "head"),
    ("students", "merged"),
    ("students", "plain"),
]
PARAMETERS = {"teacher": 2_380_938, "member": 22_168, "head": 2_570, "merged": 91_242, "plain": 91_242}
CLASSIFIERS = [("teacher", "teacher"), *(("students", role) for role in ("head", "merged", "plain"))]
DEVICE = {"cpu", "cpu_class", "cores", "onnxruntime"}


class Chain:
    """What the three commands printed and left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "runs" / "tcn4"
        full = load("fashion-mnist")
        self.images, self.labels = full.test_images[:TEST], full.test_labels[:TEST]
        target = folder / "data" / "fashion-mnist"
        target.mkdir(parents=True)
        for split, images, labels in (
            ("train", full.train_images[:TRAIN], full.train_labels[:TRAIN]),
            ("t10k", self.images, self.labels),
        ):
            header = struct.pack(">4I", 0x803, len(images), 28, 28)
            (target / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
            labels_file = struct.pack(">2I", 0x801, len(labels)) + labels.astype(np.uint8).tobytes()
            (target / f"{split}-labels-idx1-ubyte").write_bytes(labels_file)

        settings = [part for setting in SMALLER for part in ("--set", setting)]
        self.distilled = self.kdedge("distill", str(RECIPE), "--quick", "--device", "cpu", *settings)
        self.exported = self.kdedge("export", "--int8")
        self.measured = self.kdedge("bench", "--device", "cpu")

    def kdedge(self, *arguments: str) -> Any:
        """The document that a command prints, which must be all of stdout; progress is on stderr."""
        command = [sys.executable, "-m", "kdedge", *arguments, "--json"]
        environment = os.environ | {"KDEDGE_DATA": str(self.folder / "data")}
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr, "progress was expected there"
        return json.loads(done.stdout)

    def document(self, name: str) -> Any:
        return json.loads((self.run / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("chain"))


def test_distill_tells_what_it_trained(chain: Chain) -> None:
    told = chain.distilled
    assert (told["recipe"], told["run"], told["quick"], told["seed"]) == ("tcn4", "runs/tcn4", True, 0)
    sizes = {network["name"]: network["parameters"] for network in told["networks"]}
    assert sizes == {"teacher": 2_380_938, "students": 91_242}
    assert [stage["name"] for stage in told["stages"]] == ["fit teacher", "fit students", "fine-tune students.head"]
    # A teacher that saw so few real images is far from chance nevertheless; no more is asked of --quick.
    assert told["networks"][0]["validation_accuracy"] > 50


def test_the_run_holds_these_files_and_no_others(chain: Chain) -> None:
    names = sorted(path.name for path in chain.run.iterdir())
    expected = [".lock", "bench.json", "export", "predictions.npz", "run.json", "stages", "validation.json"]
    assert [name for name in names if name != "targets"] == expected
    stages = sorted(path.name.rpartition("-")[0] for path in (chain.run / "stages").iterdir())
    assert stages == ["fine-tune-students.head", "fit-students", "fit-teacher"]
    for stage in (chain.run / "stages").iterdir():
        assert sorted(path.name for path in stage.iterdir()) == ["stage.json", "weights.safetensors"]
    files = [
        f"{piece}.{precision}.onnx"
        for piece in ("teacher", *MEMBERS, "students.head", "students.merged", "students.plain")
        for precision in ("fp32", "int8")
    ]
    assert sorted(path.name for path in (chain.run / "export").iterdir()) == sorted([*files, "manifest.json"])


def test_the_manifest(chain: Chain) -> None:
    manifest = chain.document("export/manifest.json")
    assert manifest == chain.exported
    assert (manifest["format"], manifest["recipe"]) == (1, "tcn4")
    found = [(file["network"], file["role"], file["precision"]) for file in manifest["files"]]
    assert found == [(*place, precision) for place in PLACES for precision in ("fp32", "int8")]
    for file in manifest["files"]:
        assert {"network", "role", "precision", "path", "sha256", "bytes", "parameters", "inputs", "outputs"} <= set(
            file
        )
        content = (chain.run / "export" / file["path"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
        assert file["parameters"] == PARAMETERS[file["role"]]
        for tensor in file["inputs"] + file["outputs"]:
            assert set(tensor) == {"name", "dtype", "shape"}
        assert [tensor["name"] for tensor in file["inputs"]] == ["dense" if file["role"] == "head" else "image"]
    by_place = {(file["network"], file["role"], file["precision"]): file["bytes"] for file in manifest["files"]}
    assert all(by_place[(*place, "int8")] < by_place[(*place, "fp32")] / 2 for place in PLACES if place[1] == "teacher")
    assert len(manifest["calibration"]) == CALIBRATION


def predict(path: Path, name: str, given: NDArray[Any]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {name: part})[0] for part in np.array_split(given, 7)])


def correct(chain: Chain, network: str, role: str, precision: str) -> int:
    """Right answers on the test images, counted here from the files alone."""
    export = chain.run / "export"
    if role == "head":
        dense = [predict(export / f"{member}.{precision}.onnx", "image", chain.images) for member in MEMBERS]
        logits = predict(export / f"students.head.{precision}.onnx", "dense", np.concatenate(dense, axis=1))
    else:
        file = f"{network}{'' if role == 'teacher' else f'.{role}'}.{precision}.onnx"
        logits = predict(export / file, "image", chain.images)
    return int((logits.argmax(axis=1) == chain.labels).sum())


def test_the_accuracy_is_what_anyone_gets_from_the_files(chain: Chain) -> None:
    validation = chain.document("validation.json")
    assert validation == chain.measured["validation"]
    assert list(validation) == ["device", "rows"]
    assert set(validation["device"]) >= DEVICE
    places = [(row["network"], row["role"], row["precision"]) for row in validation["rows"]]
    assert places == [(*place, precision) for place in CLASSIFIERS for precision in ("fp32", "int8")]
    for row, place in zip(validation["rows"], places, strict=True):
        assert list(row) == [
            *("network", "role", "precision", "cpu_class", "split", "n", "correct", "accuracy", "accuracy_ci95"),
        ]
        assert (row["split"], row["n"], row["cpu_class"]) == ("test", TEST, validation["device"]["cpu_class"])
        assert row["correct"] == correct(chain, *place)
        assert row["accuracy"] == pytest.approx(100 * row["correct"] / TEST)
        low, high = row["accuracy_ci95"]
        assert 0 <= low < row["accuracy"] < high <= 100
    fp32 = {row["role"]: row["correct"] for row in validation["rows"] if row["precision"] == "fp32"}
    assert abs(fp32["head"] - fp32["merged"]) <= 1  # the same network, cut in two ways
    assert abs(fp32["head"] - fp32["plain"]) <= 1


def test_the_measurements(chain: Chain) -> None:
    bench = chain.document("bench.json")
    assert bench == {key: value for key, value in chain.measured.items() if key != "validation"}
    assert list(bench)[:2] == ["device", "rows"]
    assert set(bench["device"]) >= DEVICE
    manifest = {(file["network"], file["role"], file["precision"]): file for file in chain.exported["files"]}
    assert [(row["network"], row["role"], row["precision"]) for row in bench["rows"]] == list(manifest)
    for row in bench["rows"]:
        assert list(row)[:12] == [
            *("network", "role", "precision", "threads", "batch", "n"),
            *("latency_ms_p50", "latency_ms_p90", "latency_ms_p99", "cold_start_ms", "peak_rss_bytes", "file_bytes"),
        ]
        assert (row["threads"], row["batch"]) == (1, 1)
        assert row["n"] >= 200
        assert 0 < row["latency_ms_p50"] <= row["latency_ms_p90"] < 1000
        assert (row["latency_ms_p99"] is None) == (row["latency_ms_p99_ci95"] is None)
        assert row["cold_start_ms"] > row["latency_ms_p50"]
        assert 0 <= row["peak_rss_bytes"] < 1 << 30
        assert row["file_bytes"] == manifest[row["network"], row["role"], row["precision"]]["bytes"]
    latency = {(row["role"], row["precision"]): row["latency_ms_p50"] for row in bench["rows"]}
    assert latency["head", "fp32"] < latency["teacher", "fp32"]


def test_what_quick_figures_are_worth_is_said(chain: Chain) -> None:
    assert any("--quick" in verdict for verdict in chain.measured["verdicts"])


def test_the_same_commands_again_train_nothing(chain: Chain) -> None:
    settings = [part for setting in SMALLER for part in ("--set", setting)]
    weights = sorted((chain.run / "stages").rglob("weights.safetensors"))
    before = [(path, path.stat().st_mtime_ns) for path in weights]
    again = chain.kdedge("distill", str(RECIPE), "--quick", "--device", "cpu", *settings)
    assert again == chain.distilled
    assert [(path, path.stat().st_mtime_ns) for path in weights] == before
