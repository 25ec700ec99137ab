"""Makes the Arm Python that QEMU runs: `kdedge devices setup arm64`, on Debian, Ubuntu and what is made of them.

apt-get downloads with state of its own, as if on an arm64 machine on which nothing is installed, so it needs neither root nor
the host's dpkg; it checks the signature of its archive and the hash of every package. pip downloads wheels for that Python
from its index and checks their hashes. What was unpacked is hashed as a whole, and every use holds it to that.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from kdedge.devices import emulated
from kdedge.errors import DeviceError
from kdedge.wording import shorten

PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6")  # and what they depend on
WHEELS = ("numpy", "flatbuffers", "protobuf", "packaging")  # what onnxruntime imports
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_17", "manylinux2014")
TIMEOUT_S = 1800  # of one download


def setup(say: Callable[[str], None] = lambda line: None) -> Path:
    """Make the environment in the user's cache, or make it anew; `say` gets a line before each step.

    It is there whole, and has run, or it is as it was before. Raises DeviceError that names what is missing.
    """
    target = emulated.arm64_folder()
    emulated.find_qemu(emulated.GUESTS["arm64"])
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise DeviceError(
                f"{tool} is not installed: the Arm environment is made from packages of Debian or Ubuntu."
            )
    if importlib.util.find_spec("pip") is None:
        raise DeviceError(f"pip is not installed in {sys.executable}: python -m ensurepip")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".arm64.") as temporary:
            made = _make(Path(temporary), say)
            if target.exists():
                target.rename(Path(temporary) / "before")
            made.rename(target)
    except OSError as error:
        raise DeviceError(f"{error.filename or target} cannot be written: {error.strerror or error}") from None
    return target


def _make(work: Path, say: Callable[[str], None]) -> Path:
    """The environment, made in a folder of `work`."""
    made = work / "arm64"
    (made / "root").mkdir(parents=True)
    say("downloading Python and its libraries for arm64 with apt-get, about 20 MB")
    packages = _packages(work)
    for package in packages:
        _call(["dpkg-deb", "-x", str(package), str(made / "root")])
    shutil.rmtree(made / "root" / "usr" / "share", ignore_errors=True)  # manuals
    if not (made / "root" / "lib").exists():  # since Debian 13 it is a link, made by a package that is not needed here
        (made / "root" / "lib").symlink_to("usr/lib")
    say("downloading onnxruntime and numpy for arm64 with pip, about 40 MB")
    wheels = _wheels(work, emulated.python_of(made).name.removeprefix("python"))
    for wheel in wheels:
        try:
            with ZipFile(wheel) as archive:
                archive.extractall(made / "site")
        except BadZipFile as error:
            raise DeviceError(f"{wheel.name} is no wheel: {error}") from None
    say("starting it once")
    emulated.run("arm64", {"task": "fuse", "files": []}, {}, arm64=made)
    document = {
        "sha256": emulated.tree_sha256(made),
        "downloads": {file.name: emulated.file_sha256(file) for file in (*packages, *wheels)},
    }
    (made / "environment.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return made


def _packages(work: Path) -> list[Path]:
    """Debian packages of Python and all that it needs, downloaded for arm64."""
    apt = work / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (apt / folder).mkdir(parents=True)
    (apt / "status").touch()  # nothing is installed
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",  # else root's apt downloads as _apt, who cannot write here; of other users it is not read
        "Dir::State::Lists": f"{apt}/lists",
        "Dir::State::status": f"{apt}/status",
        "Dir::Cache": str(apt),
        "Dir::Cache::archives": f"{apt}/archives",
        "Debug::NoLocking": "true",
    }
    command = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    _call([*command, "update"])
    _call([*command, "install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES])
    return sorted(apt.glob("archives/*.deb"))


def _wheels(work: Path, python_version: str) -> list[Path]:
    """Wheels for an Arm Python of that version, onnxruntime in the version that is installed here."""
    platforms = [word for name in PLATFORMS for word in ("--platform", f"{name}_aarch64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python_version]
    command += [*platforms, "--platform", "any", "--dest", str(work / "wheels")]
    _call([*command, f"onnxruntime=={version('onnxruntime')}", *WHEELS])
    return sorted(work.glob("wheels/*.whl"))


def _call(command: list[str]) -> None:
    """Run a program of the system. Raises DeviceError with its last words."""
    name = "pip" if "pip" in command else command[0]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise DeviceError(f"{name} did not end within {TIMEOUT_S} s. Is there a network?") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
        raise DeviceError(f"{name} failed with exit code {done.returncode}: {shorten(' '.join(said[-3:]))}")
