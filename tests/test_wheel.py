"""The wheel as a user installs it: what is in it, and that it works without the packages of developers."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_SOURCE = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")

# Imports everything as an installation does that has no developers' packages, and says where kdedge came from.
SMOKE = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pytest", "_pytest", "ruff", "mypy", "build", "tests"}:
            raise ModuleNotFoundError(f"{name} is for developers only")

sys.meta_path.insert(0, Refuse())
import exporters, kdedge

for package in (exporters, kdedge):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
print(kdedge.__version__, kdedge.__file__, exporters.__file__)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the source, so that the source stays clean."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    # Without isolation nothing is downloaded; where setuptools is missing or too old, it must be.
    found = importlib.util.find_spec("setuptools") and int(version("setuptools").split(".")[0])
    here = ["--no-isolation"] if found and found >= 77 else []
    run(sys.executable, "-m", "build", "--wheel", *here, "--outdir", folder, folder / "source", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder in which the wheel is installed, and nothing else."""
    target = wheel.parent / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    run(*pip, "--target", target, wheel, cwd=wheel.parent)
    return target


def test_the_wheel_holds_two_packages_whole_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"kdedge", "exporters"}
    shipped = {name for name in names if ".dist-info/" not in name}
    modules = {
        path.relative_to(ROOT).as_posix() for top in ("kdedge", "exporters") for path in (ROOT / top).rglob("*.py")
    }
    assert shipped == modules | {"kdedge/py.typed", "exporters/py.typed"}
    assert any(name.endswith("/LICENSE") for name in names)


def test_every_module_loads_without_developers_packages(installed: Path, tmp_path: Path) -> None:
    said = run(sys.executable, "-W", "error", "-c", SMOKE, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert said[1:] == [str(installed / package / "__init__.py") for package in ("kdedge", "exporters")]


def test_the_installed_command_works(installed: Path, tmp_path: Path) -> None:
    command = (sys.executable, installed / "bin" / "kdedge")
    assert run(*command, "--help", cwd=tmp_path, PYTHONPATH=str(installed)).startswith("Usage: kdedge ")
    checked = run(*command, "check", ROOT / "recipes" / "tcn4.yaml", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "students: 91,242 parameters" in checked
