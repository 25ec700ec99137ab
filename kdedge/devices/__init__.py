"""The shelf of devices: each is a transport that puts files somewhere, runs runner.py there and brings its answer back.

A transport is a function `run(job, files) -> answer`: `job` is the document that runner.py describes, `files` maps the
paths that it uses to files here. Add one by adding its file and a line to DEVICES. What comes back was made by another
machine, so it is held to the forms below before anyone reads it.

A CPU class that is emulated is a device too, but not one to take times on: `ask` knows it, `find` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError

from kdedge.devices import emulated, local
from kdedge.errors import DeviceError

Transport = Callable[[Mapping[str, Any], Mapping[str, Path]], dict[str, Any]]

DEVICES: dict[str, Transport] = {"cpu": local.run}
EMULATED: dict[str, Transport] = {cpu_class: partial(emulated.run, cpu_class) for cpu_class in emulated.GUESTS}

CPU_CLASSES = ("x86-vnni", *EMULATED)  # whatever has its own arithmetic of int8, as runner.py tells them apart


class GraphAnswer(BaseModel):
    """What one graph says of n images."""

    name: str
    n: int
    correct: int
    predictions: list[int]


class AccuracyAnswer(BaseModel):
    """Answer to the task "accuracy"."""

    device: dict[str, Any]
    graphs: list[GraphAnswer]


class GraphLatencies(BaseModel):
    """Every counted run of one graph."""

    name: str
    latencies_ns: list[int] = Field(min_length=1)
    warm_up_runs: int
    settled: bool  # whether the warm-up ended because times had settled


class LatencyAnswer(BaseModel):
    """Answer to the task "latency"."""

    device: dict[str, Any]
    own_cpu_share: float  # of the wall time of the measurement
    graphs: list[GraphLatencies]


class ColdAnswer(BaseModel):
    """Answer to the task "cold"; no cold start for the empty runner."""

    device: dict[str, Any]
    cold_start_ms: float | None
    peak_rss_bytes: int


class FusedFile(BaseModel):
    """One file as onnxruntime fuses it: an ONNX graph without its weights, in hexadecimal digits."""

    name: str
    graph: str


class FuseAnswer(BaseModel):
    """Answer to the task "fuse"."""

    device: dict[str, Any]
    files: list[FusedFile]


_Answer = TypeVar("_Answer", bound=BaseModel)


def ask(device: str, job: Mapping[str, Any], files: Mapping[str, Path], form: type[_Answer]) -> _Answer:
    """The answer of `device` to `job`, in the form that the task promises. Raises DeviceError."""
    document = (EMULATED.get(device) or find(device))(job, files)
    try:
        answer = form.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DeviceError(f"{device}: the runner's answer is not usable: {where}: {first['msg']}") from None
    if device in EMULATED and (found := document["device"].get("cpu_class")) != device:
        raise DeviceError(f"{device}: the runner says that it ran on {found}")
    return answer


class CpuClass(NamedTuple):
    """A CPU class and how its arithmetic can be had on this machine."""

    name: str
    status: Literal["native", "emulated", "not here"]
    how: str  # the CPU, or what QEMU imitates, or what is missing


def cpu_classes() -> list[CpuClass]:
    """All CPU classes, and how each can be run here. Raises DeviceError when not even this machine can."""
    machine, found = here(), []
    for name in CPU_CLASSES:
        if name == machine.get("cpu_class"):
            found.append(CpuClass(name, "native", str(machine.get("cpu"))))
        elif reason := emulated.problem(name):
            found.append(CpuClass(name, "not here", reason))
        else:
            guest = emulated.GUESTS[name]
            qemu = emulated.find_qemu(guest)
            found.append(CpuClass(name, "emulated", f"{guest.cpu} by {Path(qemu).name} {emulated.version(qemu)}"))
    return found


def here() -> dict[str, Any]:
    """This machine, as the runner describes it. Raises DeviceError."""
    return ask("cpu", {"task": "fuse", "files": []}, {}, FuseAnswer).device


def find(device: str) -> Transport:
    """The transport called `device`. Raises DeviceError when there is none."""
    if device not in DEVICES:
        raise DeviceError(f"There is no device {device!r}. Devices: {', '.join(DEVICES)}.")
    return DEVICES[device]
