"""Makes docs/results/*.json from runs, and the pages from those files.

    python tools/results.py table --runs DIR/RECIPE     measured runs of a recipe with variants or seeds -> docs/results/RECIPE.json
    python tools/results.py print                       docs/results/*.json -> docs/results.md, docs/results/*.md

docs/results/fashion_mnist.json is a record of an earlier measurement, of one recipe at a time; nothing writes it any more.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "fashion_mnist.json"
PAGE = ROOT / "docs" / "results.md"
Document = dict[str, Any]


def page(results: Document) -> str:
    """docs/results.md, whole."""
    device, versions = results["device"], results["versions"]
    lines = [
        "# Results",
        "",
        "Written by `python tools/results.py print` from [results/fashion_mnist.json](results/fashion_mnist.json), a measurement of one",
        "recipe at a time; [recipes/tcn_table.yaml](../recipes/tcn_table.yaml) has such systems as variants. Every accuracy is that of an",
        "exported ONNX file in ONNX Runtime.",
        "",
        f"Machine: {device['cpu']}, {device['cores']} cores, CPU class {device['cpu_class']}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
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
        spread = f" ± {row['std']:.2f}" if row["std"] is not None else ""
        paper = f"{row['paper']:.2f}" if row["paper"] is not None else ""
        lines.append(
            f"| {row['system']} | {row['parameters']:,} | {row['precision']} | {', '.join(map(str, row['seeds']))} "
            f"| {row['mean']:.2f}{spread} | {paper} | {row['seconds']:.0f} |"
        )
    lines += ["", "## Latency", "", "One thread, batch 1, files interleaved in one process; p50 with its 95% interval."]
    for measured in results["latency"]:
        lines += ["", f"### {measured['recipe']}", ""]
        lines += ["| file | p50 ms | p90 ms | p99 ms | speed-up | kB |", "|---|---|---|---|---|---|"]
        for row in measured["rows"]:
            low, high = row["latency_ms_p50_ci95"] or (row["latency_ms_p50"],) * 2
            p99 = "" if row["latency_ms_p99"] is None else f"{row['latency_ms_p99']:.3f}"
            whole = row["role"] in ("teacher", "merged")
            lines.append(
                f"| {row['network']} {row['role']} {row['precision']} | {row['latency_ms_p50']:.3f} ({low:.3f} to {high:.3f}) "
                f"| {row['latency_ms_p90']:.3f} | {p99} | {row['speedup'] if whole else ''} | {row['file_bytes'] / 1000:,.0f} |"
            )
        lines += ["", *(f"- {verdict}" for verdict in measured["verdicts"])]
    return "\n".join(lines) + "\n"


def table(folder: Path) -> Document:
    """What `kdedge results` says of a recipe's runs, with where it was measured."""
    from kdedge.comparison import results, sentences

    found = results(folder)
    first = next(folder.glob("*/bench.json")).parent
    described, manifest, bench = (_read(first / name) for name in ("run.json", "export/manifest.json", "bench.json"))
    return {
        "data": " as ".join(described["data"][key] for key in ("name", "as") if key in described["data"]),
        "images": described["data"]["train"],
        **found.model_dump(mode="json", exclude={"rows": {"__all__": {"confusion"}}}),
        "sentences": sentences(found),
        "device": bench["device"],
        "versions": manifest["versions"],
    }


def table_page(results: Document) -> str:
    """docs/results/RECIPE.md, whole."""
    device, versions = results["device"], results["versions"]
    lines = [
        f"# {results['recipe']}",
        "",
        f"Written by `python tools/results.py print` from [{results['recipe']}.json]({results['recipe']}.json), which `table` made.",
        f"Recipe: [recipes/{results['recipe']}.yaml](../../recipes/{results['recipe']}.yaml), on {results['data']} with {results['images']:,} training images",
        f"and all {results['rows'][0]['n']:,} test images. Mean ± standard deviation over seeds; every accuracy is that of an exported ONNX",
        "file in ONNX Runtime. Time is the training of that network alone; speed is over the fp32 teacher of the same run.",
        "",
        f"Machine: {device['cpu']}, {device['cores']} cores, CPU class {device['cpu_class']}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "| network | variant | parameters | precision | seeds | accuracy % | printed % | train s | speed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        spread = f" ± {row['accuracy_sd']:.2f}" if row["accuracy_sd"] is not None else ""
        printed = " ".join(f"{known['accuracy']:g}" for known in row["reference"])
        speed = f"{row['speedup']:.2f}" if row["speedup"] is not None else ""
        lines.append(
            f"| {row['network']} | {row['variant'] or ''} | {row['parameters']:,} | {row['precision']} "
            f"| {', '.join(map(str, row['seeds']))} | {row['accuracy_mean']:.2f}{spread} | {printed} | {row['train_s']:.0f} | {speed} |"
        )
    return "\n".join([*lines, "", *(f"- {sentence}" for sentence in results["sentences"])]) + "\n"


def _read(path: Path) -> Document:
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def main() -> None:
    """Parse the command line and do one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("table").add_argument("--runs", type=Path, required=True, metavar="DIR/RECIPE")
    commands.add_parser("print")
    arguments = parser.parse_args()
    if arguments.what == "table":
        document = table(arguments.runs)
        path = RESULTS.with_name(f"{document['recipe']}.json")
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    else:
        PAGE.write_text(page(_read(RESULTS)), encoding="utf-8")
        for path in tables():
            path.with_suffix(".md").write_text(table_page(_read(path)), encoding="utf-8")


def tables() -> list[Path]:
    """The JSON files of recipes with variants."""
    return [path for path in sorted(RESULTS.parent.glob("*.json")) if path != RESULTS]


if __name__ == "__main__":
    main()
