"""How the Arm environment is made: whole or not at all, and what is said when it cannot be."""

import hashlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from kdedge.devices import arm64, emulated
from kdedge.errors import DeviceError

Calls = list[list[str]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache, on an x86 machine on which every program is installed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    return tmp_path / "cache" / "kdedge"


@pytest.fixture
def calls(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of apt-get, dpkg-deb and pip, which leave what those would leave."""
    made: Calls = []

    def call(command: list[str]) -> None:
        made.append(command)
        if "install" in command:
            (archives,) = [word.split("=")[1] for word in command if word.startswith("-oDir::Cache::archives=")]
            (Path(archives) / "python3.11-minimal_arm64.deb").write_text("packed")
        elif command[0] == "dpkg-deb":
            python = Path(command[3]) / "usr/bin/python3.11"
            python.parent.mkdir(parents=True)
            python.write_text("Arm")
        elif "pip" in command:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir()
            with ZipFile(folder / "numpy.whl", "w") as wheel:
                wheel.writestr("numpy/__init__.py", "")

    monkeypatch.setattr(arm64, "_call", call)
    return made


@pytest.fixture
def proved(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], None]:
    """Makes the trial of a new environment end well, or with an error."""

    def prove(error: Exception | None = None) -> None:
        def run(cpu_class: str, job: Any, files: Any, *, arm64: Path) -> dict[str, Any]:
            assert cpu_class == "arm64" and (arm64 / "site/numpy/__init__.py").is_file()
            (arm64 / "site/numpy/__init__.pyc").write_text("compiled by the trial")
            if error:
                raise error
            return {}

        monkeypatch.setattr(emulated, "run", run)

    prove()
    return prove


def test_it_is_made_tried_and_held_to_its_hash(cache: Path, calls: Calls, proved: Callable[..., None]) -> None:
    said: list[str] = []
    folder = arm64.setup(said.append)
    assert folder == cache / "arm64" == emulated.arm64_folder()
    assert sorted(path.name for path in cache.iterdir()) == ["arm64"]
    assert sorted(path.name for path in folder.iterdir()) == ["environment.json", "root", "site"]
    document = json.loads((folder / "environment.json").read_text())
    assert document["sha256"] == emulated.tree_sha256(folder)
    assert sorted(document["downloads"]) == ["numpy.whl", "python3.11-minimal_arm64.deb"]
    assert document["downloads"]["python3.11-minimal_arm64.deb"] == hashlib.sha256(b"packed").hexdigest()
    assert emulated.problem("arm64") is None
    assert len(said) == 3


def test_apt_has_a_state_of_its_own_and_pip_takes_wheels_for_that_python(
    cache: Path, calls: Calls, proved: Callable[..., None]
) -> None:
    arm64.setup()
    update, install, unpack, pip = calls
    assert update[0] == install[0] == "apt-get" and "update" in update
    for key in ("Dir::State::Lists", "Dir::State::status", "Dir::Cache", "Dir::Cache::archives"):
        (place,) = [word.split("=")[1] for word in install if word.startswith(f"-o{key}=")]
        assert Path(place).is_relative_to(cache)
    assert {"-oAPT::Architecture=arm64", "--download-only", *arm64.PACKAGES} <= set(install)
    assert unpack[:2] == ["dpkg-deb", "-x"]
    assert pip[:4] == [sys.executable, "-m", "pip", "download"]
    assert pip[pip.index("--python-version") + 1] == "3.11"
    assert {f"onnxruntime=={version('onnxruntime')}", "--no-deps", "--only-binary=:all:"} <= set(pip)
    assert all("://" not in word for command in calls for word in command)  # the user's own sources


def test_a_user_without_a_name_can_make_it(
    cache: Path, calls: Calls, proved: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container a user id often has no entry."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    arm64.setup()
    assert all("-oAPT::Sandbox::User=root" in command for command in calls if command[0] == "apt-get")


def test_what_does_not_run_does_not_replace_what_does(cache: Path, calls: Calls, proved: Callable[..., None]) -> None:
    before = (arm64.setup() / "environment.json").stat().st_ino
    proved(DeviceError("it died"))
    with pytest.raises(DeviceError, match="it died"):
        arm64.setup()
    assert sorted(path.name for path in cache.iterdir()) == ["arm64"]
    assert (cache / "arm64/environment.json").stat().st_ino == before
    proved()
    arm64.setup()
    assert (cache / "arm64/environment.json").stat().st_ino != before
    assert sorted(path.name for path in cache.iterdir()) == ["arm64"]


@pytest.mark.parametrize("tool", ["qemu-aarch64", "apt-get", "dpkg-deb", "pip"])
def test_what_is_missing_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch, tool: str) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if name.startswith(tool) else f"/usr/bin/{name}")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=rf"{tool}\S* is not installed"):
        arm64.setup()
    assert not cache.exists()


def test_a_program_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"^sh failed with exit code 3: no network$"):
        arm64._call(["sh", "-c", "echo no network >&2; exit 3"])
    with pytest.raises(DeviceError, match=r"^sh failed with exit code 4: it said nothing$"):
        arm64._call(["sh", "-c", "exit 4"])


def test_a_download_that_is_no_wheel_is_refused(
    cache: Path, calls: Calls, proved: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = arm64._call

    def spoil(command: list[str]) -> None:
        made(command)
        if "pip" in command:
            (Path(command[command.index("--dest") + 1]) / "numpy.whl").write_text("no zip file")

    monkeypatch.setattr(arm64, "_call", spoil)
    with pytest.raises(DeviceError, match=r"numpy\.whl is no wheel"):
        arm64.setup()
    assert list(cache.iterdir()) == []
