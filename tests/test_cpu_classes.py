"""The page on CPU classes says what its JSON says, and takes reports of `validate` alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cpu_classes", ROOT / "tools" / "cpu_classes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_printed_from_the_json(tool: ModuleType) -> None:
    reports = json.loads(tool.DOCUMENT.read_text(encoding="utf-8"))
    assert tool.DOCUMENT.with_suffix(".md").read_text(encoding="utf-8") == tool.page(reports)


def test_a_report_takes_the_place_of_the_one_before(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (before, *_) = json.loads(tool.DOCUMENT.read_text(encoding="utf-8"))
    monkeypatch.setattr(tool, "DOCUMENT", tmp_path / "made.json")
    for n, quick in ((2000, False), (1000, False), (1000, True)):
        (tmp_path / "cpu_classes.json").write_text(json.dumps(before | {"n": n, "quick": quick}))
        if quick:
            with pytest.raises(SystemExit, match="made with --quick"):
                tool.main(tmp_path)
        else:
            tool.main(tmp_path)
    (made,) = json.loads((tmp_path / "made.json").read_text())
    assert made == before | {"n": 1000}
    assert "1,000 test images" in (tmp_path / "made.md").read_text()
