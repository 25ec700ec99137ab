"""This machine as a device: real processes, real deaths."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_export import labelled_images, pixels, write_image_network

from kdedge import devices
from kdedge.devices import local
from kdedge.errors import DeviceError
from kdedge.store import sha256


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    np.save(tmp_path / "images.npy", labelled_images(20)[0])
    network = write_image_network(tmp_path / "network.onnx", pixels(list(range(10))))
    return {"images.npy": tmp_path / "images.npy", "export/network.onnx": network}


def job(files: dict[str, Path], task: str, **changes: Any) -> dict[str, Any]:
    entries = [{"name": name, "path": name, "sha256": sha256(path)} for name, path in files.items()]
    graphs = [{"name": "network", "members": entries[1:], "head": None, "threads": 1}]
    work = {"graphs": graphs} if task == "latency" else {"files": entries[1:]}
    return {"task": task, "threads": 1, "images": entries[0], **work} | changes


def test_the_answer_comes_back_and_nothing_is_left_behind(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    answer = devices.ask("cpu", job(files, "cold"), files, devices.ColdAnswer)
    assert answer.cold_start_ms and answer.peak_rss_bytes > 10e6
    assert list(temporary.iterdir()) == []


def test_a_refused_job_gives_the_exit_code_the_file_and_the_runners_words(files: dict[str, Path]) -> None:
    files["export/network.onnx"].write_bytes(b"no network")
    with pytest.raises(
        DeviceError, match=r"cold job of export/network\.onnx failed with exit code 1: runner: .*loaded"
    ):
        local.run(job(files, "cold"), files)


def test_a_changed_file_is_not_run(files: dict[str, Path]) -> None:
    document = job(files, "cold")
    files["export/network.onnx"].write_bytes(files["export/network.onnx"].read_bytes() + b"\0")
    with pytest.raises(DeviceError, match=r"network\.onnx is not the file that was sent"):
        local.run(document, files)


def test_a_killed_runner_is_told_by_its_signal(files: dict[str, Path]) -> None:
    stopped: list[int] = []

    def kill_the_child() -> None:
        children = Path(f"/proc/{os.getpid()}/task/{main}/children")
        for _ in range(500):
            for child in children.read_text().split():
                if "runner.py" in Path(f"/proc/{child}/cmdline").read_text():
                    os.kill(int(child), signal.SIGKILL)
                    stopped.append(int(child))
                    return
            time.sleep(0.01)

    main = threading.get_native_id()
    killer = threading.Thread(target=kill_the_child)
    killer.start()
    message = r"latency job of export/network\.onnx was killed by signal 9 \(Killed\): not enough memory\?"
    with pytest.raises(DeviceError, match=message):
        local.run(job(files, "latency", seconds=60, min_runs=1), files, timeout_s=20)
    killer.join()
    assert len(stopped) == 1


def test_a_runner_that_hangs_is_stopped(files: dict[str, Path]) -> None:
    began = time.monotonic()
    with pytest.raises(DeviceError, match="did not end within 1 s"):
        local.run(job(files, "latency", seconds=60, min_runs=1), files, timeout_s=1)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("task", "seconds"), [("accuracy", 43200), ("latency", 3600)])
def test_accuracy_has_half_a_day_and_other_jobs_an_hour(
    task: str, seconds: int, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracy of all graphs on 10,000 images is one job, which a slow machine does not do in an hour."""

    def hang(command: list[str], *, timeout: float, **options: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr("subprocess.run", hang)
    with pytest.raises(DeviceError, match=f"did not end within {seconds} s"):
        local.run(job(files, task), files)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("print('not JSON')", "answered with no JSON: 'not JSON"),
        ("print('[]')", "answered with list, expected a JSON object"),
        ("import os; os.kill(os.getpid(), 11)", r"killed by signal 11 \(Segmentation fault\)$"),
        ("raise SystemExit(7)", "failed with exit code 7: it said nothing"),
        ("import no_such_module", "exit code 1: ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_runner_that_goes_wrong_is_reported(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    (tmp_path / "runner.py").write_text(program)
    monkeypatch.setattr(local, "RUNNER", tmp_path / "runner.py")
    with pytest.raises(DeviceError, match=message):
        local.run(job(files, "cold"), files)


def test_an_answer_without_what_was_asked_for_is_not_used(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runner.py").write_text("""print('{"device": {}, "cold_start_ms": "soon", "peak_rss_bytes": 1}')""")
    monkeypatch.setattr(local, "RUNNER", tmp_path / "runner.py")
    with pytest.raises(DeviceError, match="cpu: the runner's answer is not usable: cold_start_ms"):
        devices.ask("cpu", job(files, "cold"), files, devices.ColdAnswer)


@pytest.mark.parametrize("name", ["../network.onnx", "/tmp/network.onnx", "runner.py"])
def test_files_stay_in_the_jobs_folder_and_hide_nothing(files: dict[str, Path], name: str) -> None:
    with pytest.raises(DeviceError, match="a job cannot have a file at"):
        local.run({"task": "cold"}, {name: files["images.npy"]})


def test_an_unknown_device_lists_the_known_ones() -> None:
    with pytest.raises(DeviceError, match=r"There is no device 'gpu'\. Devices: cpu\."):
        devices.find("gpu")


def test_devices_import_no_onnxruntime_and_no_torch() -> None:
    code = (
        "import sys, kdedge.benchmark, kdedge.validate;"
        "print([m for m in ('torch', 'torchvision', 'onnx', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
