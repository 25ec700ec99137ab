"""The story of `results`: the measured runs of a recipe -> one table over its variants and seeds, and what differs.

Every accuracy is that of an exported file on the test split, as `bench` measured it. Variants are compared with one of
them: over seeds by the interval of the mean difference, with one seed by which test images they get right.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError
from kdedge.manifest import read_manifest
from kdedge.recipe import Recipe, Reference
from kdedge.recipe_reader import resolved_recipe
from kdedge.statistics import mcnemar, mean_interval, paired_drop
from kdedge.store import Run, open_run, read_document, runs_of, write_json
from kdedge.wording import unknown

Precision = Literal["fp32", "int8"]


class ResultRow(BaseModel):
    """One network of one variant in one precision, over all seeds that were measured."""

    variant: str | None  # None: the recipe has no variants, or the network is the same in all of them
    network: str
    precision: Precision
    parameters: int
    seeds: list[int]
    accuracy: list[float]  # percent, one a seed
    accuracy_mean: float
    accuracy_sd: float | None  # None for one seed
    n: int  # test images
    confusion: list[list[int]]  # [label][prediction], summed over seeds
    train_s: float  # mean over seeds; of this network's stages alone
    speedup: float | None  # over the fp32 teacher of the same run, as `bench` has it; mean over seeds
    reference: list[Reference]


class Difference(BaseModel):
    """What a variant has over another one, for the same network in the same precision."""

    variant: str
    baseline: str
    network: str
    precision: Precision
    points: float  # percentage points of accuracy; positive when the variant is better
    ci95_points: tuple[float, float]
    seeds: int  # pairs; with one, the interval is over test images
    p_value: float | None  # McNemar's exact test over test images; None with several seeds
    distinguishable: bool


class Results(BaseModel):
    """results.json."""

    recipe: str
    classes: list[str]  # names, in the order of the confusion matrices
    rows: list[ResultRow]
    differences: list[Difference]
    missing: list[str]  # runs that are not measured yet


@dataclass(frozen=True)
class _Measured:
    """One run, as `distill`, `export` and `bench` left it."""

    recipe: Recipe
    labels: NDArray[np.int32]  # [n]
    predictions: dict[str, NDArray[np.int32]]  # by "network role precision"
    parameters: dict[str, int]
    seconds: dict[str, float]
    keys: dict[str, str]  # of the stage that gave each network its weights
    speedup: dict[str, float | None]

    def of(self, network: str, precision: Precision) -> NDArray[np.int32] | None:
        """Predictions of the file that holds the whole network."""
        names = (f"{network} {role} {precision}" for role in ("teacher", "merged"))
        return next((self.predictions[name] for name in names if name in self.predictions), None)


def results(folder: Path, against: str | None = None) -> Results:
    """Collect the runs in `folder`, or the one run that it is, and write results.json there. Raises RunError.

    Variants are compared with the one called `against`, by default the first.
    """
    runs = [open_run(path) for path in runs_of(folder)]
    measured = [_read(run) for run in runs if (run.path / "predictions.npz").is_file()]
    missing = [str(run.path) for run in runs if not (run.path / "predictions.npz").is_file()]
    if not measured:
        raise RunError(
            f"Nothing in {folder} is measured yet. First: kdedge export {folder} --int8, then kdedge bench {folder}"
        )
    variants: list[str | None] = [*measured[0].recipe.variants] or [None]
    if against is not None and against not in variants:
        raise RunError(f"{folder}: {unknown('variant', against, [name for name in variants if name])}")
    measured.sort(key=lambda one: (variants.index(one.recipe.variant), one.recipe.seed))
    found = Results(
        recipe=measured[0].recipe.name.split("/")[0],
        classes=list(DATASETS[measured[0].recipe.data.name].classes),
        rows=_rows(measured),
        differences=[],
        missing=missing,
    )
    for network, precision in dict.fromkeys((row.network, row.precision) for row in found.rows):
        found.differences += _differences(measured, network, precision, against)
    write_json(folder / "results.json", found.model_dump(mode="json"))
    return found


def _read(run: Run) -> _Measured:
    path = run.path / "predictions.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            arrays = dict(content)
        labels = arrays.pop("labels")
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise RunError(f"{path} cannot be read: {error}. Measure again: kdedge bench {run.path}") from None
    manifest, bench = read_manifest(run.path / "export"), read_document(run.path / "bench.json")
    if manifest.stages != {stage.name: stage.key for stage in run.stages}:
        raise RunError(f"{run.path} was trained again since it was measured. Export and measure it again.")
    seconds: dict[str, float] = {}
    for stage in run.stages:
        took = read_document(run.stage(stage.name) / "stage.json")["seconds"]
        seconds[stage.network] = seconds.get(stage.network, 0.0) + took
    whole = ("teacher", "merged")
    return _Measured(
        recipe=resolved_recipe(run.recipe, str(run.path / "run.json")),
        labels=labels,
        predictions=arrays,
        parameters={file.network: file.parameters for file in manifest.files if file.role in whole},
        seconds=seconds,
        keys={stage.network: stage.key for stage in run.stages},  # the last one counts
        speedup={
            f"{row['network']} {row['precision']}": row["speedup"] for row in bench["rows"] if row["role"] in whole
        },
    )


def _rows(measured: list[_Measured]) -> list[ResultRow]:
    """A row for each network, variant and precision; a network that all variants share comes once."""
    groups: dict[tuple[str, tuple[str, ...]], list[_Measured]] = {}
    for variant in dict.fromkeys(one.recipe.variant for one in measured):
        runs = [one for one in measured if one.recipe.variant == variant]
        for network in runs[0].recipe.networks:
            having = [one for one in runs if network in one.keys]
            groups.setdefault((network, tuple(one.keys[network] for one in having)), having)
    several = {network for network, _ in groups if sum(name == network for name, _ in groups) > 1}
    rows = []
    for (network, _), runs in sorted(groups.items(), key=lambda item: _place(measured, item[0][0])):
        variant = runs[0].recipe.variant if network in several else None
        for precision in ("fp32", "int8"):
            pairs = [(one, said) for one in runs if (said := one.of(network, precision)) is not None]
            if pairs:
                rows.append(_row(variant, network, precision, pairs))
    return rows


def _place(measured: list[_Measured], network: str) -> int:
    return next(list(one.recipe.networks).index(network) for one in measured if network in one.recipe.networks)


def _row(
    variant: str | None, network: str, precision: Precision, pairs: list[tuple[_Measured, NDArray[np.int32]]]
) -> ResultRow:
    first = pairs[0][0]
    classes = len(DATASETS[first.recipe.data.name].classes)
    confusion = np.zeros((classes, classes), np.int64)
    for one, said in pairs:
        np.add.at(confusion, (one.labels, said), 1)
    accuracy = [round(100 * float((said == one.labels).mean()), 4) for one, said in pairs]
    speedups = [speedup for one, _ in pairs if (speedup := one.speedup.get(f"{network} {precision}")) is not None]
    return ResultRow(
        variant=variant,
        network=network,
        precision=precision,
        parameters=first.parameters[network],
        seeds=[one.recipe.seed for one, _ in pairs],
        accuracy=accuracy,
        accuracy_mean=round(statistics.fmean(accuracy), 4),
        accuracy_sd=round(statistics.stdev(accuracy), 4) if len(accuracy) > 1 else None,
        n=len(first.labels),
        confusion=confusion.tolist(),
        train_s=round(statistics.fmean(one.seconds[network] for one, _ in pairs), 1),
        speedup=round(statistics.fmean(speedups), 4) if speedups else None,
        reference=[
            known for known in first.recipe.reference if known.network == network and known.variant in (None, variant)
        ],
    )


def _differences(
    measured: list[_Measured], network: str, precision: Precision, against: str | None
) -> list[Difference]:
    """Each variant of a network against one of them, seed by seed."""
    right: dict[str, dict[int, NDArray[np.bool_]]] = {}
    keys: dict[str, list[str]] = {}
    for one in measured:
        said = one.of(network, precision)
        if one.recipe.variant is not None and said is not None:
            right.setdefault(one.recipe.variant, {})[one.recipe.seed] = said == one.labels
            keys.setdefault(one.recipe.variant, []).append(one.keys[network])
    baseline = against or next(iter(right), None)
    if baseline not in right:
        return []
    found = []
    for variant in right:
        seeds = sorted(right[baseline].keys() & right[variant].keys())
        if seeds and keys[variant] != keys[baseline]:
            pairs = [(right[baseline][seed], right[variant][seed]) for seed in seeds]
            points, interval, p_value = _compare(pairs)
            apart = p_value < 0.05 if p_value is not None else not interval[0] <= 0 <= interval[1]
            found.append(
                Difference(
                    variant=variant,
                    baseline=baseline,
                    network=network,
                    precision=precision,
                    points=round(points, 4),
                    ci95_points=(round(interval[0], 4), round(interval[1], 4)),
                    seeds=len(seeds),
                    p_value=p_value,
                    distinguishable=apart,
                )
            )
    return found


def _compare(
    pairs: list[tuple[NDArray[np.bool_], NDArray[np.bool_]]],
) -> tuple[float, tuple[float, float], float | None]:
    """Gain of the second over the first in percentage points, its interval, and with one pair McNemar's p-value."""
    drops = [paired_drop(first, second) for first, second in pairs]
    mean, interval = mean_interval([-drop.points for drop in drops])
    if interval is not None:
        return mean, interval, None
    drop = drops[0]
    return mean, (-drop.upper_points, -drop.lower_points), mcnemar(drop.only_reference, drop.only_candidate)


def rows_to_print(found: Results) -> tuple[list[str], list[list[str]]]:
    """The table: a line for each network and variant, fp32 beside int8, and what others printed."""
    lines: dict[tuple[str, str | None], dict[str, ResultRow]] = {}
    for row in found.rows:
        lines.setdefault((row.network, row.variant), {})[row.precision] = row
    header = ["network", "params", "seeds", "fp32 %", "int8 %", "printed", "train s", "speed"]
    table = []
    for rows in lines.values():
        row = next(iter(rows.values()))
        shipped = rows.get("int8", row)
        table.append(
            [
                _label(row),
                f"{row.parameters:,}",
                str(len(row.seeds)),
                *(_percent(rows.get(precision)) for precision in ("fp32", "int8")),
                " ".join(f"{known.accuracy:g}" for known in row.reference),
                f"{row.train_s:,.0f}",
                f"{shipped.speedup:.2f}x" if shipped.speedup is not None else "",
            ]
        )
    return header, table


def classes_to_print(found: Results) -> tuple[list[str], list[list[str]]]:
    """Of the images of each class, how many in 100 get its label: a line for each network and variant, of what is shipped."""
    lines = [
        [_label(row), *(f"{percent[label]:.1f}" for label, percent in enumerate(_shares(row)))]
        for row in _shipped(found)
    ]
    return ["% of class", *_short(found.classes)], lines


def confusions_to_print(found: Results) -> Iterator[tuple[list[str], list[list[str]]]]:
    """For each network and variant: of the images of a class (a line), how many in 100 get the label of each; no 0."""
    for row in _shipped(found):
        lines = [
            [found.classes[label], *(f"{share:.1f}" if share else "" for share in percent)]
            for label, percent in enumerate(_shares(row))
        ]
        yield [_label(row), *_short(found.classes)], lines


def _shipped(found: Results) -> list[ResultRow]:
    """The rows of the files that are shipped: int8, where there is any."""
    shipped = "int8" if any(row.precision == "int8" for row in found.rows) else "fp32"
    return [row for row in found.rows if row.precision == shipped]


def _shares(row: ResultRow) -> list[list[float]]:
    """The confusion matrix in percent of the images of each label."""
    return [[100 * count / max(1, sum(counts)) for count in counts] for counts in row.confusion]


def _label(row: ResultRow) -> str:
    return row.network if row.variant is None else f"{row.network} {row.variant}"


def _short(classes: list[str]) -> list[str]:
    """So short that ten columns fit into a terminal."""
    return [name[:4] for name in classes]


def _percent(row: ResultRow | None) -> str:
    if row is None:
        return ""
    return f"{row.accuracy_mean:.2f}" + (f" ±{row.accuracy_sd:.2f}" if row.accuracy_sd is not None else "")


def sentences(found: Results) -> list[str]:
    """What differs and what does not, where the printed figures are from, and what is not measured yet.

    Differences are told of the files that are shipped: int8, where there is any.
    """
    said = []
    shipped = "int8" if any(one.precision == "int8" for one in found.differences) else "fp32"
    for one in [one for one in found.differences if one.precision == shipped]:
        low, high = one.ci95_points
        how = f"{one.seeds} seeds" if one.p_value is None else f"McNemar p = {one.p_value:.2g}"
        verdict = "" if one.distinguishable else ": not distinguishable"
        said.append(
            f"{one.network} {one.precision}, {one.variant} against {one.baseline}: {one.points:+.2f} points "
            f"({low:+.2f} to {high:+.2f}, {how}){verdict}."
        )
    printed: dict[str, Any] = dict.fromkeys(known.printed for row in found.rows for known in row.reference)
    said += [f"Printed: {source}." for source in printed]
    said += [f"Not measured yet: {path}." for path in found.missing]
    return said
