"""The runner as a device sees it: a file, a job, one JSON document on stdout."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_export import labelled_images, pixels, write_head, write_image_network

from kdedge.devices import local
from kdedge.devices.runner import cpu_class, whole_run

N = 50
TEN = list(range(10))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job's folder: the runner, images, labels and networks, but no job."""
    folder = tmp_path_factory.mktemp("device")
    shutil.copy(local.RUNNER, folder)
    images, labels = labelled_images(N)
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", labels)
    write_image_network(folder / "whole.onnx", pixels(TEN))
    write_image_network(folder / "blind.onnx", pixels([*TEN[:9], -1]))
    write_image_network(folder / "low.onnx", pixels(TEN[:5]), "dense")
    write_image_network(folder / "high.onnx", pixels(TEN[5:]), "dense")
    write_head(folder / "head.onnx", np.eye(10, dtype=np.float32))
    write_image_network(folder / "nan.onnx", np.full((784, 10), np.nan, np.float32))
    (folder / "broken.onnx").write_bytes((folder / "whole.onnx").read_bytes()[:1000])
    return folder


def entry(folder: Path, name: str) -> dict[str, str]:
    return {"name": name, "path": name, "sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()}


def job(folder: Path, task: str, **changes: Any) -> dict[str, Any]:
    known = {"task": task, "threads": 1, "images": entry(folder, "images.npy"), "labels": entry(folder, "labels.npy")}
    return known | {"batch": 20, "seconds": 0.05, "min_runs": 5} | changes


def graph(folder: Path, name: str, members: list[str], head: str | None = None) -> dict[str, Any]:
    files = [entry(folder, member) for member in members]
    return {"name": name, "members": files, "head": entry(folder, head) if head else None}


def start(folder: Path, content: str) -> subprocess.CompletedProcess[str]:
    (folder / "job.json").write_text(content)
    command = [sys.executable, "runner.py", "job.json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)


def answer(folder: Path, document: dict[str, Any]) -> dict[str, Any]:
    done = start(folder, json.dumps(document))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # fails when anything else is on stdout
    assert isinstance(found, dict)
    return found


def test_accuracy_of_files_and_chains_is_known_image_by_image(folder: Path) -> None:
    graphs = [
        graph(folder, "whole", ["whole.onnx"]),
        graph(folder, "blind", ["blind.onnx"]),
        graph(folder, "chain", ["low.onnx", "high.onnx"], "head.onnx"),
        graph(folder, "swapped", ["high.onnx", "low.onnx"], "head.onnx"),
    ]
    whole, blind, chain, swapped = answer(folder, job(folder, "accuracy", graphs=graphs))["graphs"]
    labels = [i % 10 for i in range(N)]
    assert whole == {"name": "whole", "n": N, "correct": N, "predictions": labels}
    assert blind["correct"] == N - N // 10 and blind["predictions"] == [label % 9 for label in labels]
    assert chain["predictions"] == labels
    assert swapped["predictions"] == [(label + 5) % 10 for label in labels]


def test_every_answer_describes_the_device(folder: Path) -> None:
    device = answer(folder, job(folder, "cold", files=[]))["device"]
    assert set(device) >= {"cpu", "cpu_class", "cores", "affinity", "memory_bytes", "os", "python", "numpy"}
    assert set(device) >= {"onnxruntime", "governor", "frequency_mhz", "temperature_celsius", "load_average_1min"}
    assert device["numpy"] == np.__version__ and device["memory_bytes"] > 2**28


def test_latency_times_every_graph_for_as_long_as_asked(folder: Path) -> None:
    graphs = [graph(folder, name, [f"{name}.onnx"]) | {"threads": 1} for name in ("whole", "blind", "head")]
    graphs += [graph(folder, f"chain {n}", ["low.onnx", "high.onnx"], "head.onnx") | {"threads": n} for n in (1, 2)]
    found = answer(folder, job(folder, "latency", graphs=graphs))
    assert [one["name"] for one in found["graphs"]] == ["whole", "blind", "head", "chain 1", "chain 2"]
    for one in found["graphs"]:
        assert one["warm_up_runs"] >= 50
        # The time between the runs and the uncounted ones is not in the sum, so it stays below what was asked for.
        assert len(one["latencies_ns"]) >= 5 and 0.01e9 < sum(one["latencies_ns"]) < 0.2e9
    assert 0 < found["own_cpu_share"] <= 1.05


@pytest.mark.parametrize("threads", [1, 2])
def test_a_timed_chain_gives_what_its_files_give(folder: Path, threads: int) -> None:
    images = labelled_images(N)[0]
    members = [folder / "low.onnx", folder / "high.onnx"]
    run, feeds = whole_run(members, folder / "head.onnx", threads, images)
    assert [int(run(feed)[0].argmax()) for feed in feeds[:20]] == [i % 10 for i in range(20)]


def test_latency_runs_at_least_min_runs(folder: Path) -> None:
    whole = graph(folder, "whole", ["whole.onnx"]) | {"threads": 1}
    found = answer(folder, job(folder, "latency", graphs=[whole], seconds=1e-9, min_runs=3000))
    assert len(found["graphs"][0]["latencies_ns"]) >= 3000


def test_cold_start_and_memory_are_more_than_the_empty_runners(folder: Path, tmp_path: Path) -> None:
    empty = answer(folder, job(folder, "cold", files=[]))
    assert empty["cold_start_ms"] is None
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    wide = np.random.default_rng(0).standard_normal((784, 20_000), np.float32)  # 63 MB
    write_image_network(tmp_path / "wide.onnx", wide)
    found = answer(tmp_path, job(tmp_path, "cold", files=[entry(tmp_path, "wide.onnx")]))
    assert found["cold_start_ms"] > 1
    assert 63e6 < found["peak_rss_bytes"] - empty["peak_rss_bytes"] < 400e6
    assert empty["peak_rss_bytes"] < 200e6  # not its parent's, which holds more


def test_fused_graphs_come_back_without_their_weights(folder: Path) -> None:
    files = [entry(folder, name) for name in ("whole.onnx", "head.onnx")]
    found = answer(folder, {"task": "fuse", "files": files})["files"]
    assert [file["name"] for file in found] == ["whole.onnx", "head.onnx"]
    whole, head = (onnx.load_model_from_string(bytes.fromhex(file["graph"])).graph for file in found)
    assert [node.op_type for node in head.node] == ["MatMul"] and whole.input[0].name == "image"
    (weights,) = head.initializer
    assert weights.data_type == onnx.TensorProto.FLOAT and not weights.raw_data


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "dance"}, "task: expected one of accuracy, latency, cold, fuse, given 'dance'"),
        ({"threads": "two"}, "threads: expected a number above 0, given 'two'"),
        ({"threads": 0}, "threads: expected a number above 0, given 0"),
        ({"threads": True}, "threads: expected a number above 0, given True"),
        ({"batch": -1}, "batch: expected a number above 0, given -1"),
        ({"images": "images.npy"}, "images: expected dict, given 'images.npy'"),
        ({"graphs": [{"name": "x"}]}, "expected an object with 'head'"),
        ({"graphs": [{"name": "x", "head": None, "members": []}]}, "x: expected one member"),
    ],
)
def test_a_bad_job_is_one_line_and_an_exit_code(folder: Path, changes: dict[str, Any], said: str) -> None:
    refused(folder, json.dumps(job(folder, "accuracy", graphs=[]) | changes), said)


@pytest.mark.parametrize(
    ("content", "said"), [("{", "job.json cannot be read"), ("[]", "expected an object with 'task'")]
)
def test_a_job_that_is_no_job_is_refused(folder: Path, content: str, said: str) -> None:
    refused(folder, content, said)


def test_all_hashes_are_checked_before_anything_runs(folder: Path) -> None:
    """The broken file comes first and would fail when loaded; the wrong hash of the second one is seen before."""
    wrong = entry(folder, "whole.onnx") | {"sha256": "0" * 64}
    graphs = [graph(folder, "a", ["broken.onnx"]), {"name": "b", "members": [wrong], "head": None}]
    graphs = [one | {"threads": 1} for one in graphs]
    for task in ("latency", "accuracy"):
        refused(folder, json.dumps(job(folder, task, graphs=graphs)), "whole.onnx is not the file that was sent")
    files = [entry(folder, "broken.onnx"), wrong]
    refused(folder, json.dumps(job(folder, "fuse", files=files)), "whole.onnx is not the file that was sent")


@pytest.mark.parametrize("path", ["../outside.onnx", "/etc/hostname", "link.onnx"])
def test_no_path_leaves_the_jobs_folder(folder: Path, path: str) -> None:
    outside = folder.parent / "outside.onnx"
    shutil.copy(folder / "whole.onnx", outside)
    if not (folder / "link.onnx").is_symlink():
        (folder / "link.onnx").symlink_to(outside)
    file = entry(folder, "whole.onnx") | {"path": path}
    refused(folder, json.dumps(job(folder, "cold", files=[file])), f"path '{path}' leads out of the job's folder")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken.onnx", "broken.onnx cannot be loaded"),
        ("nan.onnx", "nan.onnx: expected finite logits [20, classes], found [[nan nan"),
        ("head.onnx", "head.onnx cannot be run"),
    ],
)
def test_a_file_that_does_not_work_is_named(folder: Path, name: str, said: str) -> None:
    refused(folder, json.dumps(job(folder, "accuracy", graphs=[graph(folder, "x", [name])])), said)


def test_images_of_another_form_are_refused(folder: Path) -> None:
    np.save(folder / "floats.npy", np.zeros((4, 1, 28, 28), np.float32))
    changes = {"images": entry(folder, "floats.npy"), "files": []}
    refused(folder, json.dumps(job(folder, "cold", **changes)), "expected uint8 [n, C, H, W], found float32")
    changes = {"images": entry(folder, "whole.onnx"), "files": []}
    refused(folder, json.dumps(job(folder, "cold", **changes)), "whole.onnx cannot be read")
    changes = {"labels": entry(folder, "images.npy"), "graphs": []}
    refused(folder, json.dumps(job(folder, "accuracy", **changes)), "labels: expected 50 integers, found uint8")


def refused(folder: Path, content: str, said: str) -> None:
    done = start(folder, content)
    assert done.returncode == 1 and done.stdout == ""
    *_, last = done.stderr.splitlines()
    assert last.startswith("runner: ") and said in last, done.stderr
    assert "Traceback" not in done.stderr


def test_the_runner_needs_nothing_but_numpy_and_onnxruntime(folder: Path) -> None:
    """Loaded as a device loads it, from its own folder; the package must not come along."""
    code = "import sys, runner; print([m for m in ('kdedge', 'pydantic', 'torch', 'onnx') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


X86 = "processor\t: 0\nmodel name\t: a CPU\nflags\t\t: fpu sse2 avx2 {}\n\nprocessor\t: 1\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nBogoMIPS\t: 48.00\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "machine", "expected"),
    [
        (X86.format("avx512f avx512_vnni"), "x86_64", "x86-vnni"),
        (X86.format("avx_vnni"), "x86_64", "x86-vnni"),
        (X86.format("avx512f"), "x86_64", "x86-avx2"),
        (X86.format("avx512_vnnix"), "x86_64", "x86-avx2"),
        (X86.format("").replace("avx2", "avx"), "x86_64", "x86-sse"),
        (ARM.format("asimddp i8mm"), "aarch64", "arm64-dotprod"),
        (ARM.format("aes"), "aarch64", "arm64"),
        ("", "aarch64", "unknown"),
        ("", "x86_64", "unknown"),
        (X86.format("avx2"), "riscv64", "unknown"),
    ],
)
def test_cpu_class(cpuinfo: str, machine: str, expected: str) -> None:
    assert cpu_class(cpuinfo, machine) == expected
