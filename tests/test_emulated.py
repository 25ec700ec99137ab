"""Other CPUs: what they are told, what starts them, what is missing, and, where QEMU is, what their arithmetic does."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from random_networks import data_of, pixels_of
from torch import nn

from exporters.calibration import ranges
from exporters.float32 import to_graph
from exporters.int8 import FORMS, quantize
from kdedge import devices
from kdedge.data.batches import normalise
from kdedge.devices import emulated, runner
from kdedge.errors import DeviceError
from kdedge.models.layers import GlobalMean
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


@pytest.mark.parametrize(
    ("name", "qemu", "old", "new"),
    [
        ("x86-avx2", "qemu-x86_64-static", "6.2.0 (Debian 1:6.2+dfsg-2ubuntu6.24)", "7.2.22 (Debian 1:7.2+dfsg-7)"),
        ("arm64-dotprod", "qemu-aarch64-static", "7.0.0", "7.1.0"),
    ],
)
def test_a_qemu_without_the_instructions_of_a_cpu_is_refused(
    tools: Path, name: str, qemu: str, old: str, new: str
) -> None:
    """Of AVX2 it only warns, and onnxruntime would take the kernels that do not saturate."""
    arm_environment(emulated.arm64_folder())
    program(tools, qemu, f"echo {qemu} version '{old}'")
    cpu, needed = emulated.GUESTS[name].cpu, new[:3]
    message = f"{qemu} {old.split()[0]} cannot imitate {cpu}. Install QEMU {needed} or newer."
    assert emulated.problem(name) == message
    with pytest.raises(DeviceError, match=message):
        emulated.run(name, ANY_JOB, {})
    for version in (new, "10.0.2"):
        emulated.version.cache_clear()
        program(tools, qemu, f"echo {qemu} version '{version}'")
        assert emulated.problem(name) is None
    program(tools, qemu, "exit 1")  # those that every QEMU has do not depend on its version
    assert emulated.problem("x86-sse" if "x86" in name else "arm64") is None


def test_an_arm_machine_has_its_own_python_and_none_for_x86(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an Arm environment beside it, which no x86 CPU can run, and one that is being made."""
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    for machine in ("x86_64", "aarch64"):
        program(tools, f"qemu-{machine}-static", "echo qemu version 7.2.22")
    arm_environment(emulated.arm64_folder())
    there_is_none = "There is no x86_64 Python on this aarch64 machine, so it takes an x86_64 one."
    assert [emulated.problem(name) for name in emulated.GUESTS] == [there_is_none, there_is_none, None, None]
    with pytest.raises(DeviceError, match=there_is_none):
        emulated.run("x86-sse", ANY_JOB, {})

    started: list[str] = []

    def note(job: Any, files: Any, *, interpreter: list[str | Path], **options: Any) -> dict[str, Any]:
        started.append(str(interpreter[-1]))
        return {}

    monkeypatch.setattr("kdedge.devices.local.run", note)
    made = arm_environment(tmp_path / "made")
    emulated.run("arm64", ANY_JOB, {})
    emulated.run("arm64", ANY_JOB, {}, arm64=made)
    assert started == [str(Path(sys.executable).resolve()), str(made / "root/usr/bin/python3.11")]


def test_a_user_without_a_home_is_told_what_to_set(tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tools, "qemu-aarch64-static", "")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as for a user id without an entry
    assert emulated.problem("arm64") == (
        "There is no folder for the Arm Python, as this user has no home. Set XDG_CACHE_HOME to a folder."
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


def skip_without(device: str) -> None:
    if device != "cpu" and (problem := emulated.problem(device)):
        pytest.skip(problem)


def ask(device: str, models: dict[str, onnx.ModelProto], images: np.ndarray, folder: Path) -> devices.AccuracyAnswer:
    """What the device says of the images, by each model."""
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.zeros(len(images), np.int64))
    for name, model in models.items():
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())
    files = {name: folder / name for name in ("images.npy", "labels.npy", *(f"{name}.onnx" for name in models))}
    entries = {name: {"path": name, "sha256": sha256(path)} for name, path in files.items()}
    graphs = [{"name": name, "members": [entries[f"{name}.onnx"]], "head": None} for name in models]
    job = {"task": "accuracy", "threads": 1, "batch": len(images), "graphs": graphs}
    job |= {"images": entries["images.npy"], "labels": entries["labels.npy"]}
    answer = devices.ask(device, job, files, devices.AccuracyAnswer)
    assert device in ("cpu", answer.device["cpu_class"])
    return answer


def integer_network(pair: int, apart: int) -> onnx.ModelProto:
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
    return model


SATURATES = {"x86-vnni": False, "x86-avx2": True, "x86-sse": False, "arm64-dotprod": False, "arm64": False}


@pytest.mark.parametrize("device", ["cpu", *emulated.GUESTS])
def test_weights_of_8_bits_saturate_where_7_bits_do_not(device: str, tmp_path: Path) -> None:
    """255 * 127 + 255 * 127 is more than 16 bits hold, and what is left of it less than class 1 has; with 63 it fits."""
    skip_without(device)
    images = np.zeros((4, 1, 28, 28), np.uint8)
    images[:, 0, 0, [0, 1, 4]] = 255
    answer = ask(device, {"8 bits": integer_network(127, 100), "7 bits": integer_network(63, 50)}, images, tmp_path)
    cpu_class = answer.device["cpu_class"]
    assert [graph.predictions for graph in answer.graphs] == [[int(SATURATES[cpu_class])] * 4, [0] * 4]
    if device != "cpu":
        assert answer.device["emulated"]["cpu"] == emulated.GUESTS[device].cpu


def exported_networks(images: np.ndarray) -> dict[str, onnx.ModelProto]:
    """A convolution and a linear layer in each form that export has, and with int8 weights of all 8 bits.

    Class 0 adds all pixels, class 1 the even columns, 1.8-fold: of two products that are added first, one is 0.
    """
    info = data_of("tcn-student-4")
    samples = normalise(torch.from_numpy(images), info)
    layers = {"convolution": nn.Conv2d(1, 2, 2, stride=2, bias=False), "linear": nn.Linear(784, 2, bias=False)}
    forms = {**FORMS, "8 bits": replace(FORMS["int8"], seven_bits=False)}
    models = {}
    for kind, layer in layers.items():
        with torch.no_grad():
            layer.weight[0], layer.weight[1] = 1, 0
            layer.weight[1, ..., ::2] = 1.8
        around = (nn.Flatten(), layer) if kind == "linear" else (layer, nn.ReLU(), GlobalMean(), nn.Flatten())
        graph = to_graph(nn.Sequential(*around).eval(), samples[:2], "pixels", "logits")
        found = ranges(graph, samples.numpy())
        for name, form in forms.items():
            models[f"{kind} {name}"] = quantize(graph, found, pixels_of(info), info.shape, form)
    return models


def test_every_form_of_export_says_on_x86_avx2_what_it_says_here(tmp_path: Path) -> None:
    """Bright images are of class 0, those with bright even columns of class 1, which all are where the sums saturate."""
    skip_without("x86-avx2")
    images = np.zeros((20, 1, 28, 28), np.uint8)
    images[:10] = images[10:, ..., ::2] = np.arange(255, 215, -4)[:, None, None, None]
    classes = [0] * 10 + [1] * 10
    models = exported_networks(images)
    there, here = (ask(device, models, images, tmp_path) for device in ("x86-avx2", "cpu"))
    for answer in (there, here):
        wrong = [1] * 20 if SATURATES[answer.device["cpu_class"]] else classes
        assert {graph.name: graph.predictions for graph in answer.graphs} == {
            name: wrong if "8 bits" in name else classes for name in models
        }
