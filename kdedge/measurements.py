"""What `distill`, `export` and `bench` left of the runs of a recipe: which of them belong together, and what was measured.

A run belongs to the table when it was made by the newest version of the recipe, and counts as measured when what `bench`
wrote is of the very files that its export holds now.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from kdedge.bench_report import PARTS, BenchRow
from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError
from kdedge.manifest import read_manifest
from kdedge.recipe import Recipe
from kdedge.recipe_reader import resolved_recipe
from kdedge.store import MEASUREMENTS, Run, open_run, read_as, runs_of

File = tuple[str, str]  # network and precision of a file that holds a whole network


class Timing(BaseModel, frozen=True):
    """How long `bench` timed each file."""

    rounds: int
    seconds: float  # of each round
    threads: int


@dataclass(frozen=True)
class Measured:
    """One run, as `distill`, `export` and `bench` left it."""

    path: Path
    recipe: Recipe
    labels: NDArray[np.integer[Any]]  # [n]
    predictions: dict[File, NDArray[np.integer[Any]]]  # [n]
    parameters: dict[str, int]
    seconds: dict[str, float]  # of all stages of each network
    keys: dict[str, str]  # of the stage that gave each network its weights
    speedup: dict[File, float | None]
    timing: Timing
    own_cpu_share: float


@dataclass
class Measurements:
    """The runs of one recipe, in the order of its variants and seeds."""

    recipe: Recipe  # of the newest run
    quick: bool
    measured: list[Measured] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # runs that are not measured yet
    left_out: dict[str, str] = field(default_factory=dict)  # run, and why

    @property
    def variants(self) -> list[str | None]:
        """The variants of the recipe; only None when it has no variants."""
        return [*self.recipe.variants] or [None]


class _Bench(BaseModel):
    """What is read of bench.json."""

    rows: list[BenchRow] = Field(min_length=1)
    seconds: float
    own_cpu_share: float


class _Stage(BaseModel):
    """What is read of stage.json."""

    seconds: float


def measurements_of(folder: Path) -> Measurements:
    """The runs in `folder`, or the one run that it is. Raises RunError when one of them is damaged."""
    runs = [open_run(path) for path in runs_of(folder)]
    runs.sort(key=lambda run: (run.path / "run.json").stat().st_mtime_ns, reverse=True)
    recipes = [resolved_recipe(run.recipe, str(run.path / "run.json")) for run in runs]
    found = Measurements(recipes[0], runs[0].quick)
    versions: dict[str | None, dict[str, Any]] = {}  # of each variant, what makes its files, as the newest run says
    seen: set[tuple[str | None, int]] = set()
    for run, recipe in zip(runs, recipes, strict=True):
        variant, version = recipe.variant, recipe.model_dump(include={"data", "networks", "deploy"})
        if run.quick != found.quick:
            found.left_out[str(run.path)] = f"made {'with' if run.quick else 'without'} --quick"
        elif (
            variant not in found.variants
            or versions.setdefault(variant, version) != version
            or (variant, recipe.seed) in seen
        ):
            found.left_out[str(run.path)] = "made by another version of the recipe"
        elif (measured := _read(run, recipe)) is None:
            found.missing.append(str(run.path))
        else:
            found.measured.append(measured)
        seen.add((variant, recipe.seed))
    found.measured.sort(key=lambda one: (found.variants.index(one.recipe.variant), one.recipe.seed))
    found.missing.sort()
    return found


def _read(run: Run, recipe: Recipe) -> Measured | None:
    """What was measured of the run; None when nothing was, or when it was of other files than the run has now."""
    export = run.path / "export"
    if not all(path.is_file() for path in (export / "manifest.json", *(run.path / name for name in MEASUREMENTS))):
        return None
    manifest = read_manifest(export)
    whole = [file for file in manifest.files if file.role not in PARTS]
    try:
        bench = read_as(run.path / "bench.json", _Bench)
        names = {(file.network, file.precision): f"{file.network} {file.role} {file.precision}" for file in whole}
        arrays = _arrays(run.path / "predictions.npz", ["labels", *names.values()], recipe)
    except RunError as error:
        raise RunError(f"{error}. Measure again: kdedge bench {run.path}") from None
    exported = {(file.network, file.role, file.precision): file.sha256 for file in manifest.files}
    if manifest.stages != {stage.name: stage.key for stage in run.stages} or exported != {
        (row.network, row.role, row.precision): row.sha256 for row in bench.rows
    }:
        return None
    seconds: dict[str, float] = {}
    for stage in run.stages:
        took = read_as(run.stage(stage.name) / "stage.json", _Stage).seconds
        seconds[stage.network] = seconds.get(stage.network, 0.0) + took
    return Measured(
        path=run.path,
        recipe=recipe,
        labels=arrays["labels"],
        predictions={file: arrays[name] for file, name in names.items()},
        parameters={file.network: file.parameters for file in whole},
        seconds=seconds,
        keys={stage.network: stage.key for stage in run.stages},  # the last one counts
        speedup={(row.network, row.precision): row.speedup for row in bench.rows if row.role not in PARTS},
        timing=Timing(rounds=len(bench.rows[0].round_p50_ms), seconds=bench.seconds, threads=bench.rows[0].threads),
        own_cpu_share=bench.own_cpu_share,
    )


def _arrays(path: Path, names: list[str], recipe: Recipe) -> dict[str, NDArray[np.integer[Any]]]:
    """Arrays of predictions.npz: a class for each test image. Raises RunError when one is missing or is no such thing."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in names}
    except Exception:  # a damaged zip file fails in a dozen ways
        raise RunError(f"{path} is damaged") from None
    n, classes = arrays["labels"].size, len(DATASETS[recipe.data.name].classes)
    for name, array in arrays.items():
        if array.dtype.kind != "i" or array.shape != (n,) or not n or array.min() < 0 or array.max() >= classes:
            raise RunError(f"{path} is damaged: {name!r} is not a class from 0 to {classes - 1} for each of {n} images")
    return arrays
