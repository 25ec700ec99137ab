"""Other CPUs as devices: the runner under QEMU's user mode, in which a process sees another processor.

Right about numerics, because onnxruntime chooses its kernels by the features that the process sees, and QEMU ends a process
that uses an instruction which its CPU does not have. It says nothing of times, so none are taken.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdedge.devices import local
from kdedge.errors import DeviceError

TASKS = ("accuracy", "fuse")  # what does not depend on time


@dataclass(frozen=True)
class Guest:
    """A CPU that QEMU imitates, and what Linux says of its features there: runner.py tells its class by them."""

    machine: str  # as `platform.machine()` has it
    cpu: str  # as QEMU's option -cpu has it
    features: str
    oldest_qemu: tuple[int, int] | None = None  # that has the CPU and its instructions; None when all have


_ARM = "fp asimd aes pmull sha1 sha2 crc32"
GUESTS = {
    # Without AVX2 an older QEMU only warns, and onnxruntime takes the kernels of x86-sse, which do not saturate.
    "x86-avx2": Guest("x86_64", "Haswell", "sse sse2 ssse3 sse4_1 sse4_2 avx f16c fma avx2", (7, 2)),
    "x86-sse": Guest("x86_64", "Nehalem", "sse sse2 ssse3 sse4_1 sse4_2"),
    "arm64-dotprod": Guest(
        "aarch64", "cortex-a76", f"{_ARM} atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp", (7, 1)
    ),
    "arm64": Guest("aarch64", "cortex-a53", f"{_ARM} cpuid"),
}
_PARTS = {"cortex-a76": ("0x4", "0xd0b", "1"), "cortex-a53": ("0x0", "0xd03", "4")}  # variant, part, revision


def run(
    cpu_class: str,
    job: Mapping[str, Any],
    files: Mapping[str, Path],
    *,
    arm64: Path | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    """The runner's answer to `job` on a CPU of `cpu_class`, one of GUESTS; its `device` says what was emulated, and by what.

    `arm64` is an Arm environment that is being made, instead of the user's. Raises DeviceError like `local.run`, when something
    is missing here, and for a job that takes times.
    """
    if job.get("task") not in TASKS:
        raise DeviceError(
            f"{cpu_class} is emulated here, which says nothing of times: it does no {job.get('task')} job."
        )
    guest = GUESTS[cpu_class]
    qemu = find_qemu(guest)
    python, packages, root = _python(guest, arm64)
    environment = {"PYTHONPATH": packages} | ({} if arm64 else {"PYTHONDONTWRITEBYTECODE": "1"})
    with tempfile.TemporaryDirectory(prefix="kdedge-guest-") as prefix:
        for entry in root.iterdir() if root else ():
            (Path(prefix) / entry.name).symlink_to(entry)
        (Path(prefix) / "proc").mkdir()
        (Path(prefix) / "proc" / "cpuinfo").write_text(cpuinfo(guest), encoding="utf-8")
        # QEMU looks every path up under the prefix first, so the guest does not read of the machine's own CPU.
        command: list[str | Path] = [qemu, "-cpu", guest.cpu, "-L", prefix, python]
        answer = local.run(job, files, interpreter=command, environment=environment, timeout_s=timeout_s)
    if isinstance(device := answer.get("device"), dict):
        device["emulated"] = {"qemu": version(qemu), "cpu": guest.cpu}
    return answer


def problem(cpu_class: str) -> str | None:
    """Why `cpu_class` cannot be emulated here, in a sentence; None when it can."""
    if cpu_class not in GUESTS:
        return f"QEMU has no CPU of class {cpu_class}, so it takes such a machine."
    guest = GUESTS[cpu_class]
    try:
        find_qemu(guest)
        _python(guest)
    except DeviceError as error:
        return str(error)
    return None


def find_qemu(guest: Guest) -> str:
    """Path of QEMU's user mode for the guest's instructions. Raises DeviceError when it is not installed, or too old."""
    name = f"qemu-{guest.machine}"
    found = shutil.which(f"{name}-static") or shutil.which(name)
    if found is None:
        raise DeviceError(f"{name}-static is not installed. On Debian and Ubuntu: apt-get install qemu-user-static")
    if guest.oldest_qemu and tuple(map(int, version(found).split(".")[:2])) < guest.oldest_qemu:
        oldest = "{}.{}".format(*guest.oldest_qemu)
        raise DeviceError(
            f"{Path(found).name} {version(found)} cannot imitate {guest.cpu}. Install QEMU {oldest} or newer."
        )
    return found


@functools.cache
def version(qemu: str) -> str:
    """QEMU's version, such as "7.2.22". Raises DeviceError when it does not say."""
    try:
        said = subprocess.run([qemu, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceError(f"{qemu} --version failed: {error}") from None
    if not (found := re.search(r"version (\d+(\.\d+)+)", said)):
        raise DeviceError(f"{qemu} --version: expected a version, found {said[:80]!r}")
    return found[1]


def cpuinfo(guest: Guest, cores: int | None = None) -> str:
    """/proc/cpuinfo as Linux would write it on the guest's CPU with as many cores as this machine has.

    onnxruntime's Arm build dies on the text of an x86 machine.
    """
    lines = {"model name": guest.cpu}
    if guest.machine == "aarch64":
        variant, part, revision = _PARTS[guest.cpu]
        lines |= {"BogoMIPS": "50.00", "Features": guest.features, "CPU implementer": "0x41", "CPU architecture": "8"}
        lines |= {"CPU variant": variant, "CPU part": part, "CPU revision": revision}
    else:
        lines |= {"vendor_id": "GenuineIntel", "flags": guest.features}
    block = "".join(f"{name}\t: {value}\n" for name, value in lines.items())
    return "".join(f"processor\t: {core}\n{block}\n" for core in range(cores or os.cpu_count() or 1))


def _is_host(guest: Guest) -> bool:
    return guest.machine == platform.machine().lower().replace("amd64", "x86_64").replace("arm64", "aarch64")


def _python(guest: Guest, arm64: Path | None = None) -> tuple[Path, str, Path | None]:
    """A Python for the guest, where its onnxruntime and numpy are, and its root, if it has one. Raises DeviceError."""
    if guest.machine == "aarch64" and (arm64 or not _is_host(guest)):
        return _arm64(arm64)
    if _is_host(guest):
        return _host()
    raise DeviceError(
        f"There is no {guest.machine} Python on this {platform.machine()} machine, so it takes an {guest.machine} one."
    )


def _host() -> tuple[Path, str, None]:
    """This Python, where its onnxruntime and numpy are, and no root of its own."""
    python = Path(sys.executable).resolve()  # QEMU runs the program itself, not the link of a virtual environment
    try:
        with python.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                raise DeviceError(f"{python} is no program that QEMU can run: expected an ELF file.")
    except OSError as error:
        raise DeviceError(f"{python} cannot be read: {error.strerror}") from None
    found = [importlib.util.find_spec(name) for name in ("onnxruntime", "numpy")]
    places = [str(Path(spec.origin).parents[1]) for spec in found if spec and spec.origin]
    return python, os.pathsep.join(dict.fromkeys(places)), None


def arm64_folder() -> Path:
    """Where the user's Arm environment is: root/ with Python, site/ with onnxruntime and numpy, environment.json.

    Raises DeviceError for a user without a home.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        raise DeviceError(
            "There is no folder for the Arm Python, as this user has no home. Set XDG_CACHE_HOME to a folder."
        ) from None
    return Path(cache) / "kdedge" / "arm64"


def _arm64(made: Path | None = None) -> tuple[Path, str, Path]:
    """The Arm Python, its packages and its root: those being made, or the user's, held to their hash. Raises DeviceError."""
    again = "Make it with `kdedge devices setup arm64`."
    folder = made or arm64_folder()
    if made is None:
        try:
            recorded = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["sha256"]
        except OSError:
            raise DeviceError(f"There is no Arm Python in {folder}. {again}") from None
        except (ValueError, KeyError, TypeError):
            raise DeviceError(f"{folder / 'environment.json'} is damaged. {again}") from None
        if (found := tree_sha256(folder)) != recorded:
            raise DeviceError(f"{folder} was changed: expected SHA-256 {recorded}, found {found}. {again}")
    return python_of(folder), str(folder / "site"), folder / "root"


def python_of(folder: Path) -> Path:
    """The Python of an Arm environment. Raises DeviceError when it has none."""
    pythons = sorted((folder / "root" / "usr" / "bin").glob("python3.[0-9]*"))
    if not pythons:
        raise DeviceError(f"{folder} holds no Python.")
    return pythons[-1]


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(folder: Path) -> str:
    """Hex SHA-256 of all files in `root` and `site`: their names, and what is in them or what they link to."""
    digest = hashlib.sha256()
    for path in sorted(path for part in ("root", "site") for path in (folder / part).rglob("*")):
        if path.is_symlink():
            digest.update(f"{path.relative_to(folder)}\0{os.readlink(path)}\0".encode())
        elif path.is_file():
            digest.update(f"{path.relative_to(folder)}\0{file_sha256(path)}\0".encode())
    return digest.hexdigest()
