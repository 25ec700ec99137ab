"""The page of results is what its JSON says, and the JSON is what the issue's figures are read from."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("results", ROOT / "tools" / "results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_printed_from_the_json(results: ModuleType) -> None:
    assert results.PAGE.read_text(encoding="utf-8") == results.page(
        json.loads(results.RESULTS.read_text(encoding="utf-8"))
    )


def test_the_tables_are_printed_from_their_json(results: ModuleType) -> None:
    for path in results.tables():
        document = json.loads(path.read_text(encoding="utf-8"))
        assert path.with_suffix(".md").read_text(encoding="utf-8") == results.table_page(document), path.name


def test_every_row_carries_n_seeds_and_spread(results: ModuleType) -> None:
    rows = json.loads(results.RESULTS.read_text(encoding="utf-8"))["rows"]
    assert {(row["system"], row["precision"]) for row in rows} >= {
        (system, precision) for system in ("teacher", "tcn4", "tcn4_joint") for precision in ("fp32", "int8")
    }
    for row in rows:
        assert row["n"] == 10_000
        assert len(row["seeds"]) == len(set(row["seeds"])) == len(row["accuracies"])
        assert row["mean"] == pytest.approx(statistics.mean(row["accuracies"]), abs=1e-4)
        if len(row["seeds"]) > 1:
            assert row["std"] == pytest.approx(statistics.stdev(row["accuracies"]), abs=1e-4)
