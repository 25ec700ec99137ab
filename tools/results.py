"""Makes docs/results/*.json from runs, and the pages from those files.

    python tools/results.py run [--runs DIR] [--seeds 0 1 2] [--recipes teacher tcn4 ...]   distil, export, bench
    python tools/results.py collect [--runs DIR]                   runs -> docs/results/fashion_mnist.json
    python tools/results.py table --runs DIR/RECIPE                runs of a recipe with variants -> docs/results/RECIPE.json
    python tools/results.py print                                  docs/results/*.json -> docs/results.md, docs/results/*.md

`run` and `collect`: each seed has a folder of runs of its own, DIR/seed<N>/, in which all recipes share one teacher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "fashion_mnist.json"
PAGE = ROOT / "docs" / "results.md"
RECIPES = ("tcn4", "tcn4_joint", "kd", "tcn1", "tcn2", "tcn8")
# Malik et al. 2021, Table 3, row F-MNIST, columns T, KD and "FF" (reference/systems.md, 1.1), test accuracy in percent.
PAPER = {"teacher": 91.98, "kd": 82.87, "tcn1": 89.97, "tcn2": 89.43, "tcn4": 86.54, "tcn8": 82.33}
Document = dict[str, Any]


def run(runs: Path, seeds: list[int], recipes: list[str]) -> None:
    """Distil, export and measure each recipe with each seed. Latency is measured in full with the first seed alone."""
    for position, seed in enumerate(seeds):
        for recipe in recipes:
            folder = runs / f"seed{seed}"
            few = [] if position == 0 else ["--set", "bench.rounds=2", "--set", "bench.seconds=0.05"]
            for command in (
                ["distill", ROOT / "recipes" / f"{recipe}.yaml", "--runs", folder, "--set", f"seed={seed}", *few],
                ["export", folder / recipe, "--int8"],
                ["bench", folder / recipe, "--device", "cpu"],
            ):
                print("$ kdedge", *command, flush=True)
                subprocess.run([sys.executable, "-m", "kdedge", *map(str, command)], check=True)


def collect(runs: Path) -> Document:
    """Accuracy on the test split of every network, over seeds, and the latency that the first seed's run measured."""
    found: dict[tuple[str, str, str], list[Document]] = {}
    latency: list[Document] = []
    devices: list[Document] = []
    for folder in sorted(measured.parent for measured in runs.glob("seed*/*/bench.json")):
        validation, bench = _read(folder / "validation.json"), _read(folder / "bench.json")
        described, manifest = _read(folder / "run.json"), _read(folder / "export" / "manifest.json")
        sizes = {(file["network"], file["role"]): file["parameters"] for file in manifest["files"]}
        parts = {file["network"] for file in manifest["files"] if file["role"] == "member"}
        stages = [_read(folder / stage["folder"] / "stage.json") for stage in described["stages"]]
        seed, recipe = described["recipe"]["seed"], described["name"]
        for row in validation["rows"]:
            network = row["network"]
            if row["role"] == "head":  # the same network as the merged one, as separate files
                continue
            system = "teacher" if row["role"] == "teacher" else recipe
            entry = {
                "seed": seed,
                "accuracy": row["accuracy"],
                "correct": row["correct"],
                "n": row["n"],
                "seconds": sum(stage["seconds"] for stage in stages if _of(stage, network)),
                "parameters": sizes[network, row["role"]],
                "members": sum(part.startswith(f"{network}.") for part in parts),
            }
            known = found.setdefault((system, network, row["precision"]), [])
            if all(other["seed"] != seed for other in known):  # the teacher is the same in every recipe of a seed
                known.append(entry)
        if any(len(row["round_p50_ms"]) > 2 for row in bench["rows"]):
            latency.append({"recipe": recipe, "seed": seed, "rows": bench["rows"], "verdicts": bench["verdicts"]})
            devices.append(bench["device"])
    if not found:
        raise SystemExit(f"no measured runs in {runs}/seed*/: make them with `python tools/results.py run`")
    rows = [_row(*key, entries) for key, entries in found.items()]
    order = ["teacher", *RECIPES]
    rows.sort(key=lambda row: (order.index(row["system"]), row["precision"]))
    versions = manifest["versions"]
    return {
        "data": "fashion-mnist, test split",
        "rows": rows,
        "latency": latency,
        "device": devices[0],
        "versions": versions,
    }


def page(results: Document) -> str:
    """docs/results.md, whole."""
    device, versions = results["device"], results["versions"]
    lines = [
        "# Results",
        "",
        "Written by `python tools/results.py print` from [results/fashion_mnist.json](results/fashion_mnist.json), which",
        "`tools/results.py run` and `collect` made. Every accuracy is that of an exported ONNX file in ONNX Runtime.",
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


def _row(system: str, network: str, precision: str, entries: list[Document]) -> Document:
    accuracies = [entry["accuracy"] for entry in entries]
    return {
        "system": system,
        "network": network,
        "precision": precision,
        "parameters": entries[0]["parameters"],
        "members": entries[0]["members"],
        "n": entries[0]["n"],
        "seeds": [entry["seed"] for entry in entries],
        "accuracies": accuracies,
        "mean": round(statistics.mean(accuracies), 4),
        "std": round(statistics.stdev(accuracies), 4) if len(accuracies) > 1 else None,
        "paper": PAPER.get(system),
        "seconds": round(statistics.mean(entry["seconds"] for entry in entries), 1),
    }


def _of(stage: Document, network: str) -> bool:
    return stage["name"] in (f"fit {network}", f"fine-tune {network}.head")


def _read(path: Path) -> Document:
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def main() -> None:
    """Parse the command line and do one of the four."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "collect", "table", "print"])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    arguments = parser.parse_args()
    if arguments.what == "run":
        run(arguments.runs, arguments.seeds, arguments.recipes)
    elif arguments.what == "collect":
        _write(RESULTS, collect(arguments.runs))
    elif arguments.what == "table":
        document = table(arguments.runs)
        _write(RESULTS.with_name(f"{document['recipe']}.json"), document)
    else:
        PAGE.write_text(page(_read(RESULTS)), encoding="utf-8")
        for path in tables():
            path.with_suffix(".md").write_text(table_page(_read(path)), encoding="utf-8")


def tables() -> list[Path]:
    """The JSON files of recipes with variants."""
    return [path for path in sorted(RESULTS.parent.glob("*.json")) if path != RESULTS]


def _write(path: Path, document: Document) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
