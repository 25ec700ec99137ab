"""What `distill`, `export` and `bench` left of the runs of a recipe: which of them belong together, and what was measured.

A run belongs to the table when it was made by the newest version of the recipe, and counts as measured when what `bench`
wrote is of the very files that its export holds now. Of two of the same variant and seed, the newer one that is measured
counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field

from kdedge.bench_report import BUSY, COMPARED, BenchRow
from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError
from kdedge.manifest import ExportedFile, Manifest, read_manifest
from kdedge.recipe import Recipe
from kdedge.recipe_reader import resolved_recipe
from kdedge.store import MEASUREMENTS, Run, open_run, read_as, runs_of

File = tuple[str, str]  # network, and fp32 or int8, of a file that holds a whole network; int8 in the form that ships


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
    files: dict[File, ExportedFile]  # as the manifest has them
    seconds: dict[str, float]  # of all stages of each network
    keys: dict[str, str]  # of the stage that gave each network its weights
    speedup: dict[File, float | None]  # None where nothing has a teacher, and all of them when the machine was busy
    timing: Timing
    own_cpu_share: float
    other_forms: dict[str, str]  # of networks that ship in another form of int8 than the first: which


Runs = dict[int, Measured]  # of one variant, by seed


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
    device: dict[str, Any]


class _Stage(BaseModel):
    """What is read of stage.json."""

    seconds: float


def measurements_of(folder: Path) -> Measurements:
    """The runs in `folder`, or the one run that it is. Raises RunError when one of them is damaged."""
    runs = [open_run(path) for path in runs_of(folder)]
    runs.sort(key=lambda run: (run.path / "run.json").stat().st_mtime_ns, reverse=True)
    recipes = [resolved_recipe(run.recipe, str(run.path / "run.json")) for run in runs]
    found = Measurements(recipes[0], runs[0].quick)
    newest: dict[str | None, Recipe] = {}  # of each variant
    taken: dict[tuple[str | None, int], Path] = {}
    for run, recipe in zip(runs, recipes, strict=True):
        variant, path = recipe.variant, str(run.path)
        if run.quick != found.quick:
            found.left_out[path] = f"made {'with' if run.quick else 'without'} --quick"
        elif (
            variant not in found.variants
            or (variant and recipe.variants.get(variant) != found.recipe.variants[variant])
            or not all(_agree(recipe, other) for other in newest.values())
        ):
            found.left_out[path] = "made by another version of the recipe"
        elif newer := taken.get((variant, recipe.seed)):
            found.left_out[path] = f"as {newer} is a newer run of the same variant and seed"
        else:
            newest.setdefault(variant, recipe)
            if (measured := _read(run, recipe)) is None:
                found.missing.append(path)
            else:
                found.measured.append(measured)
                taken[variant, recipe.seed] = run.path
    found.measured.sort(key=lambda one: (found.variants.index(one.recipe.variant), one.recipe.seed))
    found.missing.sort()
    return found


def by_variant(measured: list[Measured]) -> dict[str | None, Runs]:
    """The runs of each variant."""
    found: dict[str | None, Runs] = {}
    for one in measured:
        found.setdefault(one.recipe.variant, {})[one.recipe.seed] = one
    return found


def sharing(measured: list[Measured], network: str) -> list[tuple[list[str | None], Runs]]:
    """The variants that share a network, and its runs: one for each seed that any of them was measured with, timed if any is."""
    groups: list[tuple[list[str | None], Runs]] = []
    for variant, runs in by_variant([one for one in measured if network in one.keys]).items():
        for variants, shared in groups:
            if same_network(runs, shared, network):
                variants.append(variant)
                for seed, one in runs.items():
                    if seed not in shared or shared[seed].speedup.get((network, "fp32")) is None:
                        shared[seed] = one
                break
        else:
            groups.append(([variant], runs))
    return groups


def same_network(runs: Runs, others: Runs, network: str) -> bool:
    """Whether both have one and the same network, as far as they have seeds in common, and they have."""
    common = runs.keys() & others.keys()
    return bool(common) and all(runs[seed].keys[network] == others[seed].keys[network] for seed in common)


def _agree(one: Recipe, other: Recipe) -> bool:
    """Whether two runs can be of one version of a recipe: their files are made alike, but for what their variants change."""
    runs = () if one.variant == other.variant else (one, other)
    changed = [f"{path.replace('[', '.')}." for run in runs if run.variant for path in run.variants[run.variant]]
    differing = (
        at
        for part in ("data", "networks", "deploy")
        for at in _differences(getattr(one, part), getattr(other, part), f"{part}.")
    )
    return all(any(at.startswith(path) or path.startswith(at) for path in changed) for at in differing)


def _differences(one: Any, other: Any, at: str) -> Iterator[str]:
    """The paths at which two parts of a recipe differ, as recipes write them, each with a dot at its end."""
    if isinstance(one, BaseModel) and type(one) is type(other):
        for name, declared in type(one).model_fields.items():
            yield from _differences(getattr(one, name), getattr(other, name), f"{at}{declared.alias or name}.")
    elif isinstance(one, dict) and isinstance(other, dict):
        for name in one | other:
            yield from _differences(one.get(name), other.get(name), f"{at}{name}.")
    elif one != other:
        yield at


def _read(run: Run, recipe: Recipe) -> Measured | None:
    """What was measured of the run; None when nothing was, or when it was of other files than the run has now."""
    export = run.path / "export"
    if not all(path.is_file() for path in (export / "manifest.json", *(run.path / name for name in MEASUREMENTS))):
        return None
    manifest = read_manifest(export)
    try:
        bench = read_as(run.path / "bench.json", _Bench)
        whole = _whole(manifest, str(bench.device.get("cpu_class")))
        names = {key: f"{file.network} {file.role} {file.precision}" for key, file in whole.items()}
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
    speedup = {row.sha256: row.speedup for row in bench.rows}
    return Measured(
        path=run.path,
        recipe=recipe,
        labels=arrays["labels"],
        predictions={file: arrays[name] for file, name in names.items()},
        files=whole,
        seconds=seconds,
        keys={stage.network: stage.key for stage in run.stages},  # the last one counts
        speedup={key: speedup[file.sha256] if bench.own_cpu_share >= BUSY else None for key, file in whole.items()},
        timing=Timing(rounds=len(bench.rows[0].round_p50_ms), seconds=bench.seconds, threads=bench.rows[0].threads),
        own_cpu_share=bench.own_cpu_share,
        other_forms={
            network: file.precision for (network, _), file in whole.items() if file.precision not in ("fp32", "int8")
        },
    )


def _whole(manifest: Manifest, cpu_class: str) -> dict[File, ExportedFile]:
    """The files of whole networks, of a group the merged one; of several forms of int8 the one that ships for this CPU class."""
    ships = manifest.ships.get(cpu_class, [])
    found: dict[File, ExportedFile] = {}
    for file in manifest.files:
        key = file.network, "fp32" if file.precision == "fp32" else "int8"
        if file.role in COMPARED and (key not in found or file.path in ships):
            found[key] = file
    return found


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
