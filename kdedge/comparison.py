"""The story of `results`: the measured runs of a recipe -> one table over its variants and seeds, and what differs.

Every accuracy is that of an exported file on the test split, as `bench` measured it. Variants are compared with one of
them: over seeds by the interval of the mean difference, with one seed by which test images they get right. Speeds are those of
quiet machines alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from kdedge.bench_report import BUSY
from kdedge.data.catalog import DATASETS
from kdedge.errors import RunError
from kdedge.manifest import Precision
from kdedge.measurements import Measured, Measurements, Timing, by_variant, measurements_of, same_network, sharing
from kdedge.recipe import Reference
from kdedge.statistics import mcnemar, mean_gain
from kdedge.store import write_json
from kdedge.wording import unknown


class ResultRow(BaseModel):
    """One network of one variant in one precision, over all seeds that were measured."""

    variant: str | None  # "a, b" when these two share the network; None when all do, or the recipe has no variants
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
    speedup: float | None  # over the fp32 teacher of the same run, measured on a quiet machine; mean over seeds
    speedup_sd: float | None  # None for one seed
    file_bytes: int | None = None  # of the ONNX file; mean over seeds
    # Of the file and its network in torch, the worst of all seeds: as the manifest has them.
    agreement_with_torch_min: float | None = None  # percent of images; where it was trained quantized
    difference_to_torch_max: float | None = None  # of a logit
    reference: list[Reference]


class Difference(BaseModel):
    """What a variant has over another one, for the same network in the same precision."""

    variant: str
    baseline: str
    network: str
    precision: Precision
    points: float  # percentage points of accuracy; positive when the variant is better
    seeds: int  # pairs
    ci95_points: tuple[float, float] | None  # over seeds and test images; None with one seed
    p_value: float | None  # McNemar's exact test over test images; None with several seeds
    distinguishable: bool  # the interval excludes 0, or with one seed p < 0.05


class Results(BaseModel):
    """results.json."""

    recipe: str
    quick: bool
    classes: list[str]  # names, in the order of the confusion matrices
    rows: list[ResultRow]
    differences: list[Difference]
    timing: list[Timing]  # of the measurements; more than one when they were not made alike
    own_cpu_share: list[float]  # of each measurement, as `bench` has it
    other_forms: dict[str, str] = {}  # networks of runs whose int8 is not the first form of it, and which it is
    missing: list[str]  # runs that are not measured yet
    left_out: dict[str, str]  # runs that do not belong to the others, and why


def results(folder: Path, *against: str) -> Results:
    """Collect the runs in `folder`, or the one run that it is, and write results.json there. Raises RunError.

    Variants are compared with each of those called `against`, by default with the first.
    """
    runs = measurements_of(folder)
    for name in against:
        if name not in runs.recipe.variants:
            raise RunError(f"{folder}: {unknown('variant', name, runs.recipe.variants)}")
    if not runs.measured:
        raise RunError(
            f"Nothing in {folder} is measured yet. First: kdedge export {folder} --int8, then kdedge bench {folder}"
        )
    rows = _rows(runs)
    found = Results(
        recipe=runs.recipe.name.split("/")[0],
        quick=runs.quick,
        classes=list(DATASETS[runs.recipe.data.name].classes),
        rows=rows,
        differences=[
            difference
            for network, precision in dict.fromkeys((row.network, row.precision) for row in rows)
            for difference in _differences(runs.measured, network, precision, against)
        ],
        timing=list(dict.fromkeys(one.timing for one in runs.measured)),
        own_cpu_share=[one.own_cpu_share for one in runs.measured],
        other_forms={
            f"{one.path}: {network}": form for one in runs.measured for network, form in one.other_forms.items()
        },
        missing=runs.missing,
        left_out=runs.left_out,
    )
    write_json(folder / "results.json", found.model_dump(mode="json"))
    return found


def _rows(runs: Measurements) -> list[ResultRow]:
    """A row for each network, variant and precision; a network that variants share comes once."""
    rows = []
    names = dict.fromkeys(network for one in runs.measured for network in one.recipe.networks)
    everywhere = len(by_variant(runs.measured))
    for network in names:
        for variants, shared in sharing(runs.measured, network):
            of_all = len(variants) == everywhere and (everywhere > 1 or not runs.recipe.variants)
            reference = [
                known
                for known in runs.recipe.reference
                if known.network == network and known.variant in (None, *variants)
            ]
            for precision in ("fp32", "int8"):
                having = [shared[seed] for seed in sorted(shared) if (network, precision) in shared[seed].predictions]
                if having:
                    label = None if of_all else ", ".join(name for name in variants if name)
                    rows.append(_row(label, network, precision, having, reference))
    return rows


def _row(
    variant: str | None, network: str, precision: Precision, runs: list[Measured], reference: list[Reference]
) -> ResultRow:
    file, first = (network, precision), runs[0]
    files = [one.files[file] for one in runs]
    classes = len(DATASETS[first.recipe.data.name].classes)
    confusion = np.zeros((classes, classes), np.int64)
    for one in runs:
        np.add.at(confusion, (one.labels, one.predictions[file]), 1)
    accuracy = [round(100 * float((one.predictions[file] == one.labels).mean()), 4) for one in runs]
    speedups = _known(one.speedup[file] for one in runs)
    return ResultRow(
        variant=variant,
        network=network,
        precision=precision,
        parameters=files[0].parameters,
        seeds=[one.recipe.seed for one in runs],
        accuracy=accuracy,
        accuracy_mean=round(statistics.fmean(accuracy), 4),
        accuracy_sd=_spread(accuracy),
        n=len(first.labels),
        confusion=confusion.tolist(),
        train_s=round(statistics.fmean(one.seconds[network] for one in runs), 1),
        speedup=round(statistics.fmean(speedups), 4) if speedups else None,
        speedup_sd=_spread(speedups),
        file_bytes=round(statistics.fmean(one.bytes for one in files)),
        agreement_with_torch_min=min(_known(one.agreement_with_torch for one in files), default=None),
        difference_to_torch_max=max(_known(one.difference_to_torch for one in files), default=None),
        reference=reference,
    )


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _spread(values: list[float]) -> float | None:
    return round(statistics.stdev(values), 4) if len(values) > 1 else None


def _differences(
    measured: list[Measured], network: str, precision: Precision, against: tuple[str, ...]
) -> list[Difference]:
    """Each variant of a network against some of them, by default the first; no two are compared twice."""
    having = by_variant([one for one in measured if (network, precision) in one.predictions])
    runs = {variant: of_variant for variant, of_variant in having.items() if variant is not None}
    found: dict[frozenset[str], Difference] = {}
    for baseline in [name for name in against or list(runs)[:1] if name in runs]:
        for variant in runs:
            two = frozenset((variant, baseline))
            if two not in found and not same_network(runs[variant], runs[baseline], network):
                labels = next(iter(runs[baseline].values())).labels
                pairs = [
                    (other, runs[variant][seed])
                    for seed, other in runs[baseline].items()
                    if seed in runs[variant]
                    and all(np.array_equal(one.labels, labels) for one in (other, runs[variant][seed]))
                ]
                if pairs:
                    found[two] = _difference(variant, baseline, network, precision, pairs)
    return list(found.values())


def _difference(
    variant: str, baseline: str, network: str, precision: Precision, pairs: list[tuple[Measured, Measured]]
) -> Difference:
    """From a run of the baseline and one of the variant for each seed: over seeds, or with one over the test images."""
    before, after = (
        np.array([one.predictions[network, precision] == one.labels for one in side], np.int8)
        for side in zip(*pairs, strict=True)
    )
    points, interval = mean_gain(after - before)
    p_value = None
    if interval is not None:
        distinguishable = not interval[0] <= 0 <= interval[1]
    else:
        p_value = mcnemar(int((before > after).sum()), int((after > before).sum()))
        distinguishable = p_value < 0.05
    return Difference(
        variant=variant,
        baseline=baseline,
        network=network,
        precision=precision,
        points=round(points, 4),
        seeds=len(pairs),
        ci95_points=interval and (round(interval[0], 4), round(interval[1], 4)),
        p_value=p_value,
        distinguishable=distinguishable,
    )


def rows_to_print(found: Results) -> tuple[list[str], list[list[str]]]:
    """The table: a line for each network and variant, fp32 beside int8, and what others printed."""
    lines: dict[tuple[str, str | None], dict[str, ResultRow]] = {}
    for row in found.rows:
        lines.setdefault((row.network, row.variant), {})[row.precision] = row
    header = ["network", "params", "seeds", "fp32 %", "int8 %", "printed", "train", "speed x"]
    table = []
    for rows in lines.values():
        row = next(iter(rows.values()))
        shipped = rows.get("int8", row)
        table.append(
            [
                _label(row),
                f"{row.parameters:,}",
                str(len(row.seeds)),
                *(_accuracy(rows.get(precision)) for precision in ("fp32", "int8")),
                " ".join(f"{known.accuracy:g}" for known in row.reference),
                f"{row.train_s:,.0f} s",
                _figure(shipped.speedup, shipped.speedup_sd),
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


def _accuracy(row: ResultRow | None) -> str:
    return "" if row is None else _figure(row.accuracy_mean, row.accuracy_sd)


def _figure(mean: float | None, spread: float | None) -> str:
    return "" if mean is None else f"{mean:.2f}" + (f"±{spread:.2f}" if spread is not None else "")


def sentences(found: Results) -> list[str]:
    """The warnings, what differs and what does not, where the printed figures are from, and what is not in the table.

    Differences are told of the files that are shipped: int8, where there is any.
    """
    said = []
    if found.quick:
        said.append("These runs were --quick: their accuracies mean nothing, and their latencies are few.")
    if busy := sum(share < BUSY for share in found.own_cpu_share):
        said.append(
            f"Something else kept the processor busy during {busy} of {len(found.own_cpu_share)} measurements: their "
            "speeds are left out, and training may have taken longer than on an idle machine."
        )
    shipped = "int8" if any(one.precision == "int8" for one in found.differences) else "fp32"
    for one in [one for one in found.differences if one.precision == shipped]:
        if one.ci95_points is not None:
            low, high = one.ci95_points
            how = f"{low:+.2f} to {high:+.2f}, {one.seeds} seeds"
        else:
            how = f"McNemar p = {one.p_value:.2g}"
        verdict = "" if one.distinguishable else ": not distinguishable"
        said.append(
            f"{one.network} {one.precision}, {one.variant} against {one.baseline}: {one.points:+.2f} points ({how}){verdict}."
        )
    printed = dict.fromkeys(known.printed for row in found.rows for known in row.reference)
    said += [f"Printed: {source}." for source in printed]
    said += [
        f"{name} has its int8 accuracy in {form}: int8 did not pass its gate."
        for name, form in found.other_forms.items()
    ]
    said += [f"Left out, {why}: {path}." for path, why in found.left_out.items()]
    said += [f"Not measured yet: {path}." for path in found.missing]
    return said
