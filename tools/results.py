"""Makes docs/results/*.json from runs, and the pages from those files.

    python tools/results.py table --runs DIR/RECIPE [--against VARIANT ...]    measured runs -> docs/results/RECIPE.json
    python tools/results.py print                                  docs/results/*.json -> docs/results.md, docs/results/*.md

docs/results/deploy.json, calibration.json and train.json are what `python tools/benchmark.py deploy --json` and so on print.
docs/results/fashion_mnist.json is a record of an earlier measurement, of one recipe at a time; nothing writes it any more.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kdedge.bench_report import COMPARED
from kdedge.comparison import results, sentences
from kdedge.deployment import COMPARED_IMAGES
from kdedge.errors import KdedgeError, RecipeError
from kdedge.manifest import read_manifest
from kdedge.measurements import measurements_of
from kdedge.recipe import Recipe
from kdedge.store import open_run, read_document
from kdedge.variants import load_recipes
from kdedge.wording import KeyPath, dotted

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "fashion_mnist.json"
PAGE = ROOT / "docs" / "results.md"
FORMS = {  # of a group in one file
    "plain_fp32": "fp32, a branch a member",
    "merged_fp32": "fp32, as exported",
    "plain_int8": "int8, a branch a member",
    "merged_int8": "int8, as exported",
}
Document = dict[str, Any]


def page(results: Document) -> str:
    """docs/results.md, whole."""
    lines = [
        "# Results",
        "",
        "Written by `python tools/results.py print` from [results/fashion_mnist.json](results/fashion_mnist.json), a measurement of one",
        "recipe at a time; [recipes/tcn_table.yaml](../recipes/tcn_table.yaml) has such systems as variants. Every accuracy is that of an",
        "exported ONNX file in ONNX Runtime.",
        "",
        _machine(results),
        "",
        "## Accuracy on Fashion-MNIST",
        "",
        "All 10,000 test images; mean and standard deviation over seeds, where there is more than one. Settings were chosen",
        "on validation images cut from the training set; [lab-notes.md](lab-notes.md) tells which, how many, and when the test",
        "split was looked at. Time is the training of that network alone, without its teacher's. The paper is Malik et al.",
        "2021, Table 3 (one run each).",
        "",
        "| network | parameters | precision | seeds | accuracy % | paper % | train s |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        paper = f"{row['paper']:.2f}" if row["paper"] is not None else ""
        lines.append(
            f"| {row['system']} | {row['parameters']:,} | {row['precision']} | {', '.join(map(str, row['seeds']))} "
            f"| {_figure(row['mean'], row['std'])} | {paper} | {row['seconds']:.0f} |"
        )
    lines += ["", "## Latency", "", "One thread, batch 1, files interleaved in one process; p50 with its 95% interval."]
    for measured in results["latency"]:
        lines += ["", f"### {measured['recipe']}", ""]
        lines += ["| file | p50 ms | p90 ms | p99 ms | speed-up | kB |", "|---|---|---|---|---|---|"]
        for row in measured["rows"]:
            low, high = row["latency_ms_p50_ci95"] or (row["latency_ms_p50"],) * 2
            p99 = "" if row["latency_ms_p99"] is None else f"{row['latency_ms_p99']:.3f}"
            whole = row["role"] in COMPARED
            lines.append(
                f"| {row['network']} {row['role']} {row['precision']} | {row['latency_ms_p50']:.3f} ({low:.3f} to {high:.3f}) "
                f"| {row['latency_ms_p90']:.3f} | {p99} | {row['speedup'] if whole else ''} | {row['file_bytes'] / 1000:,.0f} |"
            )
        lines += ["", *(f"- {verdict}" for verdict in measured["verdicts"])]
    return "\n".join(lines) + "\n"


def table(folder: Path, against: Sequence[str] = ()) -> Document:
    """What `kdedge results` says of a recipe's runs, with where it was measured. Raises KdedgeError."""
    found = results(folder, *against)
    if found.quick:
        raise KdedgeError(f"{folder} was made with --quick: its accuracies mean nothing, so there is no page of them.")
    measured = measurements_of(folder).measured
    first, *others = measured
    conditions = _conditions(first.path)
    for one in others:
        if changes := [f"{dotted(at)}={value}" for at, value in _changes(conditions, _conditions(one.path))]:
            raise KdedgeError(
                f"{one.path} has {', '.join(changes)}, unlike {first.path}; a page is of the same images, one "
                f"machine and one set of versions. Measure alike: kdedge export {folder} --int8, then kdedge bench {folder}."
            )
    return {
        **conditions,
        "settings": settings(ROOT / "recipes" / f"{found.recipe}.yaml", [one.recipe for one in measured]),
        **found.model_dump(mode="json", exclude={"rows": {"__all__": {"confusion"}}}),
        "sentences": sentences(found),
    }


def _conditions(run: Path) -> Document:
    """On which images, which machine and with which versions a run was made and measured."""
    data, device = open_run(run).data, read_document(run / "bench.json")["device"]
    versions = read_manifest(run / "export").versions
    return {
        "data": data_name(data),
        "images": data["train"],
        "compared_images": min(COMPARED_IMAGES, len(data["validation"])),
        "device": {key: device[key] for key in ("cpu", "cores", "cpu_class")},
        "versions": versions | {name: device[name] for name in versions if name in device},  # of what timed the files
    }


def data_name(data: Document) -> str:
    """The dataset of a run, such as "fashion-mnist as rgb32"."""
    return " as ".join(data[key] for key in ("name", "as") if key in data)


def distill(name: str, arguments: Sequence[str]) -> list[str]:
    """The command that makes the runs of the recipe `name`, with what `settings` found."""
    return ["kdedge", "distill", f"recipes/{name}.yaml", *_each("--set", arguments)]


def settings(path: Path, made: list[Recipe]) -> list[str]:
    """The --set arguments with which the recipe at `path` gives the runs that were made.

    Raises KdedgeError when there are none, because the recipe has changed since in what --set cannot say.
    """
    variants = load_recipes(path)[0].variants
    own = {one.variant: one.variants[one.variant] for one in made if one.variant in variants}
    arguments = [f"variants.{name}={json.dumps(own[name])}" for name in own if own[name] != variants[name]]
    described = load_recipes(path, arguments)
    written = {one.variant: _content(one) for one in described}
    changes: dict[KeyPath, Any] = {}
    for one in made:
        if one.variant in written:
            changes |= dict(_changes(written[one.variant], _content(one)))
    seeds = sorted({one.seed for one in made})
    if seeds != sorted({one.seed for one in described}):
        by_name = made[0].name.endswith(f"seed{made[0].seed}")
        changes |= {("seeds",): seeds} if by_name else {("seed",): seeds[0]}
    if described[0].reference and not made[0].reference:  # the source's figures are of other images
        changes[("reference",)] = []
    arguments += [f"{dotted(key)}={v if isinstance(v, str) else json.dumps(v)}" for key, v in changes.items()]
    try:
        again = {(one.variant, one.seed): _content(one) for one in load_recipes(path, arguments)}
    except RecipeError:
        again = {}
    if any(again.get((one.variant, one.seed)) != _content(one) for one in made):
        raise KdedgeError(f"{path} has changed since these runs were made, and not only in what --set can say.")
    return arguments


def _content(recipe: Recipe) -> Document:
    """What a run is made and measured by."""
    resolved = recipe.resolved()
    return {key: resolved[key] for key in ("data", "networks", "deploy", "bench")}


def _changes(before: Any, after: Any, at: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """The paths at which two plain values differ, as deep as they go, with what stands there afterwards."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            yield from _changes(before.get(key), after.get(key), (*at, key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _changes(old, new, (*at, number))
    elif before != after:
        yield at, after


def table_page(results: Document) -> str:
    """docs/results/RECIPE.md, whole."""
    name, runs = results["recipe"], f"runs/{results['recipe']}"
    baselines = dict.fromkeys(one["baseline"] for one in results["differences"])
    commands = [
        distill(name, results["settings"]),
        ["kdedge", "export", runs, "--int8"],
        ["kdedge", "bench", runs],
        ["python", "tools/results.py", "table", "--runs", runs, *_each("--against", baselines)],
    ]
    timed = " or ".join(
        f"{one['rounds']} {'rounds' if one['rounds'] > 1 else 'round'} of {one['seconds']:g} s on {one['threads']} "
        + ("threads" if one["threads"] > 1 else "thread")
        for one in results["timing"]
    )
    sized = "file_bytes" in results["rows"][0]  # older documents have none
    columns = ["network", "variant", "parameters", "precision", "seeds", "accuracy %", "printed %", "train s", "speed"]
    columns += ["kB"] * sized
    lines = [
        f"# {name}",
        "",
        f"Written by `python tools/results.py print` from [{name}.json]({name}.json), which these commands made.",
        f"Recipe: [recipes/{name}.yaml](../../recipes/{name}.yaml), on {results['data']} with {results['images']:,} training images",
        f"and all {results['rows'][0]['n']:,} test images. Mean ± standard deviation over seeds; every accuracy is that of an exported ONNX",
        "file in ONNX Runtime. Time is the training of that network alone; speed is over the fp32 teacher of the same run,",
        f"every file timed in {timed}.",
        "",
        "```sh",
        *map(shlex.join, commands),
        "```",
        "",
        _machine(results),
        "",
        _line(columns),
        "|" + "---|" * len(columns),
    ]
    for row in results["rows"]:
        printed = " ".join(f"{known['accuracy']:g}" for known in row["reference"])
        accuracy, speed = (
            _figure(row[mean], row[spread])
            for mean, spread in (("accuracy_mean", "accuracy_sd"), ("speedup", "speedup_sd"))
        )
        cells = [row["network"], row["variant"] or "", f"{row['parameters']:,}", row["precision"]]
        cells += [", ".join(map(str, row["seeds"])), accuracy, printed, f"{row['train_s']:.0f}", speed]
        if sized:
            cells.append(f"{row['file_bytes'] / 1000:,.0f}")
        lines.append(_line(cells))
    return "\n".join([*lines, "", *(f"- {one}" for one in (*results["sentences"], *_parity(results)))]) + "\n"


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _parity(results: Document) -> Iterator[str]:
    """How near each file of what was trained quantized is to its simulation in torch."""
    for row in results["rows"]:
        if (agreement := row.get("agreement_with_torch_min")) is not None:
            variant = f", {row['variant']}," if row["variant"] else ""
            yield (
                f"{row['network']} {row['precision']}{variant} gives the class of its simulation in torch on at least "
                f"{agreement:.2f}% of {results['compared_images']:,} validation images with every seed; logits differ by "
                f"{row['difference_to_torch_max']:.3g} at most."
            )


def deploy_page(results: Document) -> str:
    """docs/results/deploy.md, whole."""
    lines = [
        "# Latency of small networks beside their teachers",
        "",
        "Written by `python tools/results.py print` from [deploy.json](deploy.json), which `python tools/benchmark.py deploy --json` made:",
        f"p50 in ms at batch {results['batch']} on {results['threads']} thread, median of {results['rounds']} rounds of "
        f"{results['seconds']:g} s a file, and in brackets its ratio to",
        "the teacher's in fp32 in the same round, for what ships in int8 with its least and its greatest. Files take turns in one",
        "process. Weights are untrained. A student alone has one branch; tcn4_edge/tcn4 is tcn4_edge beside the teacher of tcn4.",
        "",
        f"{_machine(results)} The runner had at least {100 * results['own_cpu_share']:.1f}% of its core.",
    ]
    for runtime in ("onnxruntime", "openvino"):
        if runtime not in results["versions"]:
            continue
        lines += [
            "",
            f"## {runtime}",
            "",
            f"| case | teacher, fp32 | {' | '.join(FORMS.values())} |",
            "|---|---|---|---|---|---|",
        ]
        for row in results["rows"]:
            found = row if runtime == "onnxruntime" else row[runtime]
            cells = [f"{found[f'{form}_ms_p50']:.3f} ({found[f'{form}_ratio']:.3f})" for form in FORMS]
            cells[-1] = f"{cells[-1][:-1]}, {found['ratio_min']:.3f} to {found['ratio_max']:.3f})"
            lines.append(f"| {row['case']} | {found['teacher_fp32_ms_p50']:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def train_page(results: Document) -> str:
    """docs/results/train.md, whole."""
    precision = "bfloat16, which this CPU multiplies" if results["kdedge_in_bf16"] else "float32"
    lines = [
        "# Speed of training beside a user's loop",
        "",
        "Written by `python tools/results.py print` from [train.json](train.json), which `python tools/benchmark.py train --json` made: the",
        "four students of tcn4 learn the teacher's dense vector, by the loop that a user would write, in float32, and by kdedge's,",
        f"in {precision}. The loops take turns, each in a process of its own; images per second are",
        f"images times students that see them, medians of {results['rounds']} rounds; ratios are of one round, with the least and the greatest.",
        "",
        _machine(results),
        "",
        "| batch | user's loop, images/s | kdedge, images/s | ratio |",
        "|---|---|---|---|",
        *(
            f"| {row['batch_size']} | {row['user_loop_images_per_s']:,} | {row['kdedge_images_per_s']:,} "
            f"| {row['ratio']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f}) |"
            for row in results["rows"]
        ),
    ]
    return "\n".join(lines) + "\n"


def calibration_page(results: Document) -> str:
    """docs/results/calibration.md, whole."""
    return "\n".join(
        [
            "# Calibrating a large network",
            "",
            "Written by `python tools/results.py print` from [calibration.json](calibration.json), which `python tools/benchmark.py calibrate",
            f"--json` made: the ranges of a ResNet-50's activations on {results['images']} random images of "
            f"{'x'.join(map(str, results['shape']))}, each calibrator",
            "in a process of its own. Peak memory is of the whole process, with the images and what was loaded before.",
            "",
            _machine(results),
            "",
            "| calibrator | seconds | peak memory, GiB |",
            "|---|---|---|",
            *(
                f"| {row['calibrator']} | {row['seconds']:.0f} | {row['peak_rss_bytes'] / 2**30:.2f} |"
                for row in results["rows"]
            ),
            "",
        ]
    )


def _machine(results: Document) -> str:
    device, versions = results["device"], results["versions"]
    known = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"Machine: {device['cpu']}, {device['cores']} cores, CPU class {device['cpu_class']}. {known}."


def _each(option: str, values: Iterable[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def _figure(mean: float | None, spread: float | None) -> str:
    return "" if mean is None else f"{mean:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def _read(path: Path) -> Document:
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def main() -> None:
    """Parse the command line and do one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("table")
    one.add_argument("--runs", type=Path, required=True, metavar="DIR/RECIPE")
    one.add_argument("--against", action="append", default=[], metavar="VARIANT")
    commands.add_parser("print")
    arguments = parser.parse_args()
    if arguments.what == "table":
        try:
            document = table(arguments.runs, arguments.against)
        except KdedgeError as error:
            sys.exit(str(error))
        path = RESULTS.with_name(f"{document['recipe']}.json")
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    else:
        PAGE.write_text(page(_read(RESULTS)), encoding="utf-8")
        for path, made in MEASURED.items():
            path.with_suffix(".md").write_text(made(_read(path)), encoding="utf-8")
        for path in tables():
            path.with_suffix(".md").write_text(table_page(_read(path)), encoding="utf-8")


def tables() -> list[Path]:
    """The JSON files of recipes with variants."""
    others = (RESULTS, RESULTS.with_name("cpu_classes.json"), *MEASURED)
    return [path for path in sorted(RESULTS.parent.glob("*.json")) if path not in others]


MEASURED = {  # what tools/benchmark.py measured, and how its page is made
    RESULTS.with_name("deploy.json"): deploy_page,
    RESULTS.with_name("calibration.json"): calibration_page,
    RESULTS.with_name("train.json"): train_page,
}


if __name__ == "__main__":
    main()
