"""Distil a network into one or several small students, export them as int8 ONNX, and prove the files on the device.

The commands as functions: `distill`, `export`, `bench`, `results` and `verify`, and `load_recipe` and `load_recipes` for what
the first one takes. Importing this package imports nothing heavy; each function imports what it needs when it is first looked up.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdedge.benchmark import bench
    from kdedge.comparison import results
    from kdedge.deployment import export
    from kdedge.distillation import distill
    from kdedge.errors import KdedgeError
    from kdedge.variants import load_recipe, load_recipes
    from kdedge.verification import verify

__all__ = [
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

_HOME = {
    "KdedgeError": "errors",
    "bench": "benchmark",
    "distill": "distillation",
    "export": "deployment",
    "load_recipe": "variants",
    "load_recipes": "variants",
    "results": "comparison",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kdedge")
    if name not in _HOME:
        raise AttributeError(f"module 'kdedge' has no attribute {name!r}")
    return getattr(import_module(f"kdedge.{_HOME[name]}"), name)
