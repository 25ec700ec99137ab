"""The page on CPU classes says what its JSON says, and takes reports of `validate` alone."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kdedge.portability import CpuClasses, graph_name
from kdedge.store import Run, StageRecord, write_json
from kdedge.variants import load_recipes

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("cpu_classes")


@pytest.fixture
def report(tool: ModuleType) -> dict[str, Any]:
    reports = json.loads(tool.DOCUMENT.read_text(encoding="utf-8"))
    found: dict[str, Any] = next(one for one in reports if one["recipe"] == "tcn4")
    return found


def write_run(folder: Path, report: dict[str, Any], *overrides: str) -> None:
    """What `distill` and `validate` leave of a run of tcn4."""
    (recipe,) = load_recipes(ROOT / "recipes" / "tcn4.yaml", overrides)
    stage = StageRecord(name="fit teacher", network="teacher", key="0" * 64, folder="stages/fit-teacher-0000")
    data = dict.fromkeys(("fingerprint", "train", "validation", "calibration")) | {"name": recipe.data.name}
    folder.mkdir(exist_ok=True)
    Run(name="tcn4", quick=False, recipe=recipe.resolved(), data=data, stages=[stage], versions={}, path=folder).write()
    write_json(folder / "cpu_classes.json", CpuClasses.model_validate(report).model_dump(mode="json"))


def test_the_page_is_printed_from_the_json(tool: ModuleType) -> None:
    reports = json.loads(tool.DOCUMENT.read_text(encoding="utf-8"))
    assert tool.DOCUMENT.with_suffix(".md").read_text(encoding="utf-8") == tool.page(reports)


def test_every_shipped_recipe_has_rows_of_every_class(tool: ModuleType) -> None:
    reports = [CpuClasses.model_validate(one) for one in json.loads(tool.DOCUMENT.read_text(encoding="utf-8"))]
    named = {one.recipe.partition("/")[0] for one in reports}
    assert named == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    for one in reports:
        found = {(graph_name(row), row.cpu_class) for row in one.rows if row.status == "validated"}
        graphs = {graph_name(row) for row in one.rows}
        assert found == {(graph, cpu_class) for graph in graphs for cpu_class in tool.devices.CPU_CLASSES}


def test_a_report_takes_the_place_of_the_one_before(
    tool: ModuleType, report: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "DOCUMENT", tmp_path / "made.json")
    for n, *overrides in (2000, "data.limit=9000"), (1000, "networks.teacher.fit.epochs=2"):
        write_run(tmp_path / "tcn4", report | {"n": n}, *overrides)
        tool.main(tmp_path / "tcn4")
    (made,) = json.loads((tmp_path / "made.json").read_text())
    assert made == report | {"n": 1000, "settings": ["networks.teacher.fit.epochs=2"]}
    page = (tmp_path / "made.md").read_text()
    assert "1,000 test images of fashion-mnist" in page
    assert "kdedge distill recipes/tcn4.yaml --set networks.teacher.fit.epochs=2\n" in page


def test_a_quick_run_is_refused(tool: ModuleType, report: dict[str, Any], tmp_path: Path) -> None:
    write_run(tmp_path, report | {"quick": True})
    with pytest.raises(tool.KdedgeError, match="made with --quick"):
        tool.report_of(tmp_path)


def test_what_was_not_validated_and_what_differs_is_told(tool: ModuleType, report: dict[str, Any]) -> None:
    rows = [row for row in report["rows"] if (row["network"], row["cpu_class"]) != ("teacher", "arm64")]
    missing = dict.fromkeys(("accuracy", "accuracy_ci95", "qemu", "differing", "agreement_fp32", "agreement_native"))
    for number, row in enumerate(rows):
        if row["cpu_class"] == "x86-sse":
            rows[number] = row | missing | {"status": "not validated", "reason": "no QEMU."}
        elif (row["network"], row["cpu_class"]) == ("teacher", "x86-avx2"):
            rows[number] = row | {"accuracy": 90.95, "differing": 51}
    page = tool.page([report | {"rows": rows}])
    (line,) = (line for line in page.splitlines() if line.startswith("| teacher"))
    assert line.split(" | ")[4:] == ["90.95 (51)", "not validated", "93.60 (0)", "not validated |"]
    assert page.endswith("|\n\n- x86-sse was not validated: no QEMU.\n")
