"""Other CPUs: what they are told, what starts them, what is missing, and, where QEMU is, what their arithmetic does."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_export import labelled_images

from kdedge import devices
from kdedge.devices import emulated, runner
from kdedge.errors import DeviceError
from kdedge.store import sha256

ANY_JOB: dict[str, Any] = {"task": "fuse", "files": []}


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder of programs, on an x86 machine without an Arm environment."""
    folder = tmp_path / "tools"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    return folder


def program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def arm_environment(folder: Path) -> Path:
    """A folder that looks like an Arm environment."""
    (folder / "root/usr/bin").mkdir(parents=True)
    (folder / "root/usr/bin/python3.11").write_bytes(b"\x7fELF")
    (folder / "root/lib").symlink_to("usr/lib")
    (folder / "site").mkdir()
    (folder / "site/numpy.py").write_text("")
    (folder / "environment.json").write_text(json.dumps({"sha256": emulated.tree_sha256(folder)}))
    return folder


@pytest.mark.parametrize(("name", "guest"), emulated.GUESTS.items())
def test_the_runner_takes_each_guest_for_its_class(name: str, guest: emulated.Guest) -> None:
    text = emulated.cpuinfo(guest, cores=3)
    assert runner.cpu_class(text, guest.machine) == name
    assert runner.cpuinfo_value(text, "model name") == guest.cpu
    assert [line for line in text.splitlines() if line.startswith("processor")] == [
        f"processor\t: {n}" for n in range(3)
    ]
    assert text.endswith("\n\n")


def test_every_class_is_listed_and_one_has_no_guest() -> None:
    assert devices.CPU_CLASSES == ("x86-vnni", "x86-avx2", "x86-sse", "arm64-dotprod", "arm64")
    assert emulated.problem("x86-vnni") == "QEMU has no CPU of class x86-vnni, so it takes such a machine."


def test_the_runner_is_started_under_qemu_with_a_cpuinfo_of_the_guest(tools: Path, tmp_path: Path) -> None:
    """A stand-in for QEMU notes how it is called and what is in its prefix, and runs the command as it is."""
    said = tmp_path / "said"
    program(
        tools,
        "qemu-x86_64-static",
        f"""if [ "$1" = --version ]; then echo "qemu-x86_64 version 7.2.22 (Debian 1:7.2)"; exit; fi
printf '%s\\n' "$1 $2 $3" "$5" "$PYTHONDONTWRITEBYTECODE" > {said}
while IFS= read -r line; do printf '%s\\n' "$line"; done < "$4/proc/cpuinfo" > {said}.cpuinfo
shift 4
exec "$@" """,
    )
    answer = emulated.run("x86-sse", ANY_JOB, {})
    assert answer["device"]["emulated"] == {"qemu": "7.2.22", "cpu": "Nehalem"}
    options, python, no_bytecode = said.read_text().splitlines()
    assert (options, no_bytecode) == ("-cpu Nehalem -L", "1")
    assert Path(python) == Path(python).resolve() and Path(python).read_bytes()[:4] == b"\x7fELF"
    assert Path(f"{said}.cpuinfo").read_text() == emulated.cpuinfo(emulated.GUESTS["x86-sse"])


def test_no_times_are_taken_under_emulation() -> None:
    for task in ("latency", "cold"):
        with pytest.raises(DeviceError, match=f"x86-sse is emulated here, which says nothing of times: .* {task} job"):
            emulated.run("x86-sse", {"task": task}, {})
    with pytest.raises(DeviceError, match="There is no device 'x86-sse'"):  # so that bench refuses it at once
        devices.find("x86-sse")


def test_a_missing_qemu_is_named(tools: Path) -> None:
    for name, qemu in (("x86-sse", "qemu-x86_64-static"), ("arm64", "qemu-aarch64-static")):
        assert emulated.problem(name) == (
            f"{qemu} is not installed. On Debian and Ubuntu: apt-get install qemu-user-static"
        )


def test_an_arm_environment_is_used_only_as_it_was_made(tools: Path, tmp_path: Path) -> None:
    program(tools, "qemu-aarch64-static", "")
    folder = emulated.arm64_folder()
    assert folder == tmp_path / "cache/kdedge/arm64"
    missing = f"There is no Arm Python in {folder}. Make it with `kdedge devices setup arm64`."
    assert emulated.problem("arm64") == missing

    arm_environment(folder)
    assert emulated.problem("arm64") is None
    (folder / "site/numpy.py").write_text("changed")
    assert f"{folder} was changed: expected SHA-256 " in str(emulated.problem("arm64"))
    (folder / "site/numpy.py").write_text("")
    assert emulated.problem("arm64") is None
    (folder / "root/lib").unlink()
    (folder / "root/lib").symlink_to("elsewhere")
    assert "was changed" in str(emulated.problem("arm64"))
    (folder / "environment.json").write_text("{}")
    assert "environment.json is damaged. Make it with" in str(emulated.problem("arm64"))


def test_the_classes_say_how_they_can_be_had(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tools, "qemu-x86_64-static", "echo qemu-x86_64 version 9.1.0")
    monkeypatch.setattr(devices, "here", lambda: {"cpu": "a CPU", "cpu_class": "x86-avx2"})
    found = {one.name: (one.status, one.how) for one in devices.cpu_classes()}
    assert list(found) == list(devices.CPU_CLASSES)
    assert found["x86-avx2"] == ("native", "a CPU")
    assert found["x86-sse"] == ("emulated", "Nehalem by qemu-x86_64-static 9.1.0")
    assert found["x86-vnni"][0] == found["arm64"][0] == "not here"


def integer_network(path: Path, pair: int, apart: int) -> Path:
    """Two classes of an image whose pixels 0, 1 and 4 are 255, from integer weights.

    Class 0 has `pair` at pixels 0 and 1, whose products are added first; class 1 has `apart` at pixels 0 and 4.
    """
    weights = np.zeros((784, 2), np.int8)
    weights[[0, 1], 0] = pair
    weights[[0, 4], 1] = apart
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMulInteger", ["flat", "weights"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["logits"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "integers",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["batch", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())
    return path


SATURATES = {"x86-vnni": False, "x86-avx2": True, "x86-sse": False, "arm64-dotprod": False, "arm64": False}


@pytest.mark.parametrize("device", ["cpu", *emulated.GUESTS])
def test_weights_of_8_bits_saturate_where_7_bits_do_not(device: str, tmp_path: Path) -> None:
    """255 * 127 + 255 * 127 is more than 16 bits hold, and what is left of it less than class 1 has; with 63 it fits."""
    if device != "cpu" and (problem := emulated.problem(device)):
        pytest.skip(problem)
    images = labelled_images(4)[0]
    images[:] = 0
    images[:, 0, 0, [0, 1, 4]] = 255
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.zeros(4, np.int64))
    files = {
        "images.npy": tmp_path / "images.npy",
        "labels.npy": tmp_path / "labels.npy",
        "8 bits.onnx": integer_network(tmp_path / "8 bits.onnx", 127, 100),
        "7 bits.onnx": integer_network(tmp_path / "7 bits.onnx", 63, 50),
    }
    entries = {name: {"path": name, "sha256": sha256(path)} for name, path in files.items()}
    graphs = [{"name": name, "members": [entries[f"{name}.onnx"]], "head": None} for name in ("8 bits", "7 bits")]
    job = {"task": "accuracy", "threads": 1, "batch": 4, "graphs": graphs}
    job |= {"images": entries["images.npy"], "labels": entries["labels.npy"]}
    answer = devices.ask(device, job, files, devices.AccuracyAnswer)
    cpu_class = answer.device["cpu_class"]
    assert device in ("cpu", cpu_class)
    assert [graph.predictions for graph in answer.graphs] == [[int(SATURATES[cpu_class])] * 4, [0] * 4]
    if device != "cpu":
        assert answer.device["emulated"]["cpu"] == emulated.GUESTS[device].cpu
