"""What `import kdedge` offers, and that it goes on offering it whatever was imported before."""

import inspect
import tomllib
from pathlib import Path

import pytest

import kdedge
from kdedge import benchmark, comparison, deployment, distillation, errors, variants, verification

ROOT = Path(__file__).parent.parent


def test_the_names_of_the_package() -> None:
    assert kdedge.__all__ == [
        "KdedgeError",
        "__version__",
        "bench",
        "distill",
        "export",
        "load_recipe",
        "load_recipes",
        "results",
        "verify",
    ]
    assert all(getattr(kdedge, name) for name in kdedge.__all__)


def test_the_commands_are_functions_though_their_modules_were_imported() -> None:
    assert kdedge.load_recipe is variants.load_recipe
    assert kdedge.distill is distillation.distill
    assert kdedge.export is deployment.export
    assert kdedge.bench is benchmark.bench
    assert kdedge.results is comparison.results
    assert kdedge.verify is verification.verify
    assert kdedge.KdedgeError is errors.KdedgeError


def test_the_parameters_that_people_pass() -> None:
    def names(function: str) -> list[str]:
        return list(inspect.signature(getattr(kdedge, function)).parameters)

    assert names("load_recipe") == ["path", "overrides"]
    assert names("distill") == [
        *("recipe", "runs", "device", "data_dir", "quick", "checkpoint_every_s", "progress"),
    ]
    assert names("export") == ["run", "int8", "repair", "data_dir", "progress", "known"]
    assert names("bench") == ["run", "device", "threads", "data_dir", "progress", "known"]
    assert names("verify") == ["folder", "data_dir", "progress"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'kdedge' has no attribute 'distil'"):
        _ = kdedge.distil


def test_the_version_is_that_of_pyproject() -> None:
    assert kdedge.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
