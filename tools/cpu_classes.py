"""Makes docs/results/cpu_classes.json from what `kdedge validate` said of some runs, and the page from that file.

    python tools/cpu_classes.py runs/tcn4 runs/tcn4_best/seed0 ...      without runs: the page alone

A run that is not named keeps what the file has of it.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

from results import ROOT, Document, data_name, distill, settings

from kdedge import devices
from kdedge.errors import KdedgeError
from kdedge.portability import IMAGES, ClassRow, CpuClasses, graph_name, with_interval
from kdedge.recipe_reader import resolved_recipe
from kdedge.store import CPU_CLASSES, open_run, read_as, runs_of

DOCUMENT = ROOT / "docs" / "results" / "cpu_classes.json"
TOOLS = ("python", "numpy", "onnxruntime")
MACHINE = ("cpu", "cores", "cpu_class", *TOOLS)


def page(reports: list[Document]) -> str:
    """docs/results/cpu_classes.md, whole."""
    lines = [
        "# int8 on every CPU class",
        "",
        "Written by `python tools/cpu_classes.py` from [cpu_classes.json](cpu_classes.json), which the commands of each run made.",
        "Accuracy of the exported files in percent, with half its 95% interval, on this machine: fp32, and int8. `as fp32`: the",
        "percentage of images that get the same class from both. Then the accuracy of the same int8 file on each CPU class, and in",
        "brackets how many images get another class there than here. Classes that are not this machine's are emulated by QEMU, which",
        "says nothing of times. Where a recipe was shortened for this page, its command says so: what counts here is that the columns",
        "agree.",
    ]
    for content in reports:
        report = CpuClasses.model_validate(content)
        device = report.device
        qemu = sorted({f"QEMU {row.qemu['qemu']}" for row in report.rows if row.qemu})
        tools = [f"{name} {device[name]}" for name in TOOLS]
        where = {row.cpu_class: row.qemu["cpu"] for row in report.rows if row.qemu}
        emulated = [name for name in devices.CPU_CLASSES if name != device["cpu_class"]]
        header = ["graph", "fp32", f"int8 ({device['cpu_class']})", "as fp32"]
        header += [f"{name} ({where[name]})" if name in where else name for name in emulated]
        lines += [
            "",
            f"## {report.recipe}",
            "",
            f"{report.n:,} test images of {content['data']}. {device['cpu']}, {device['cores']} cores. {', '.join([*tools, *qemu])}.",
            "",
            "```sh",
            *map(shlex.join, _commands(report, content["settings"])),
            "```",
            "",
            f"| {' | '.join(header)} |",
            f"|{'---|' * len(header)}",
            *(f"| {' | '.join(cells)} |" for cells in _rows(report, emulated)),
        ]
        reasons = {row.cpu_class: row.reason for row in report.rows if row.reason}
        lines += ["", *(f"- {name} was not validated: {reason}" for name, reason in reasons.items())] if reasons else []
    return "\n".join(lines) + "\n"


def _commands(report: CpuClasses, arguments: list[str]) -> list[list[str]]:
    """What makes the run and its report."""
    run, images = f"runs/{report.recipe}", [] if report.n == IMAGES else ["--images", str(report.n)]
    return [
        distill(_recipe(report), arguments),
        ["kdedge", "export", run, "--int8"],
        ["kdedge", "validate", run, *images],
    ]


def _recipe(report: CpuClasses) -> str:
    """The recipe, without the variant and the seed."""
    return report.recipe.partition("/")[0]


def _rows(report: CpuClasses, emulated: list[str]) -> list[list[str]]:
    """A row a graph: its accuracy in fp32 and in int8 here, and that of the int8 file on each emulated class."""
    fp32 = {(row.network, row.role): row.accuracy for row in report.fp32}
    by_graph: dict[str, dict[str, ClassRow]] = {}
    for row in report.rows:
        by_graph.setdefault(graph_name(row), {})[row.cpu_class] = row
    table = []
    for name, rows in by_graph.items():
        network, role = name.split()[:2]
        here = rows.get(report.device["cpu_class"])
        table.append([name, f"{fp32[network, role]:.2f}", *_here(here), *(_there(rows.get(one)) for one in emulated)])
    return table


def _here(row: ClassRow | None) -> tuple[str, str]:
    if row is None or row.accuracy is None:
        return "not validated", ""
    return with_interval(row), f"{row.agreement_fp32:.2f}"


def _there(row: ClassRow | None) -> str:
    return "not validated" if row is None or row.accuracy is None else f"{row.accuracy:.2f} ({row.differing})"


def report_of(run: Path) -> Document:
    """What `kdedge validate` said of a run, with how the run was made. Raises KdedgeError."""
    report = read_as(run / CPU_CLASSES, CpuClasses)
    if report.quick:
        raise KdedgeError(f"{run} was made with --quick: its accuracies mean nothing.")
    recipe = _recipe(report)
    runs = [open_run(path) for path in runs_of(run if report.recipe == recipe else run.parent)]
    made = [resolved_recipe(one.recipe, str(one.path / "run.json")) for one in runs]
    return {
        **report.model_dump(mode="json"),
        "device": {key: report.device[key] for key in MACHINE},
        "data": data_name(runs[0].data),
        "settings": settings(ROOT / "recipes" / f"{recipe}.yaml", made),
    }


def main(*runs: str) -> None:
    """Take in the reports of some runs, and write the file and the page."""
    known = json.loads(DOCUMENT.read_text(encoding="utf-8")) if DOCUMENT.exists() else []
    reports = {one["recipe"]: one for one in known}
    reports |= {one["recipe"]: one for one in map(report_of, map(Path, runs))}
    content = [reports[name] for name in sorted(reports)]
    DOCUMENT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.with_suffix(".md").write_text(page(content), encoding="utf-8")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except KdedgeError as error:
        sys.exit(str(error))
