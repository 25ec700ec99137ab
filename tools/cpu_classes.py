"""Makes docs/results/cpu_classes.json from what `kdedge validate` said of some runs, and the page from that file.

    python tools/cpu_classes.py runs/tcn4 runs/tcn4_best/seed0 ...      without runs: the page alone

A recipe that is not among the runs keeps what the file has of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kdedge.portability import CpuClasses, rows_to_print
from kdedge.store import CPU_CLASSES, read_as

DOCUMENT = Path(__file__).parent.parent / "docs" / "results" / "cpu_classes.json"
TOOLS = ("python", "numpy", "onnxruntime")
MACHINE = ("cpu", "cores", "cpu_class", *TOOLS)


def page(reports: list[dict[str, Any]]) -> str:
    """docs/results/cpu_classes.md, whole."""
    lines = [
        "# int8 on every CPU class",
        "",
        "Written by `python tools/cpu_classes.py` from [cpu_classes.json](cpu_classes.json), which `kdedge validate` made of each run:",
        "accuracy of the exported int8 files in percent with half its 95% interval, and the percentage of images that get the same",
        "class as from the fp32 file and as from the same int8 file on this machine. Emulated classes are run by QEMU, which says",
        "nothing of times.",
    ]
    for report in map(CpuClasses.model_validate, reports):
        device = report.device
        qemu = sorted({f"QEMU {row.qemu['qemu']}" for row in report.rows if row.qemu})
        tools = [f"{name} {device[name]}" for name in TOOLS]
        header, rows = rows_to_print(report)
        lines += [
            "",
            f"## {report.recipe}",
            "",
            f"{report.n:,} test images. Machine: {device['cpu']}, {device['cores']} cores, {device['cpu_class']}. "
            f"{', '.join([*tools, *qemu])}. In fp32 on this machine: "
            + ", ".join(f"{row.network} {row.role} {row.accuracy:.2f}" for row in report.fp32)
            + ".",
            "",
            *(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)),
        ]
        reasons = {row.cpu_class: row.reason for row in report.rows if row.reason}
        lines += ["", *(f"- {name} was not validated: {reason}" for name, reason in reasons.items())] if reasons else []
    return "\n".join(lines) + "\n"


def main(*runs: str) -> None:
    """Take in the reports of some runs, and write the file and the page."""
    reports = (
        {one["recipe"]: one for one in json.loads(DOCUMENT.read_text(encoding="utf-8"))} if DOCUMENT.exists() else {}
    )
    for run in runs:
        report = read_as(Path(run) / CPU_CLASSES, CpuClasses)
        if report.quick:
            sys.exit(f"{run} was made with --quick: its accuracies mean nothing.")
        reports[report.recipe] = report.model_dump(mode="json") | {
            "device": {key: report.device[key] for key in MACHINE}
        }
    content = [reports[name] for name in sorted(reports)]
    DOCUMENT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.with_suffix(".md").write_text(page(content), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
