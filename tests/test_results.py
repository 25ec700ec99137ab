"""The pages of results say what their JSON says, and how to make it again."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kdedge.errors import KdedgeError
from kdedge.variants import load_recipes

ROOT = Path(__file__).parent.parent
LIMITED = ROOT / "recipes" / "limited.yaml"


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


def test_a_page_has_sizes_and_parity_where_its_json_has(results: ModuleType) -> None:
    document = json.loads((ROOT / "docs" / "results" / "quantized_student.json").read_text(encoding="utf-8"))
    rows = document["rows"]
    for row in rows:
        for key in ("file_bytes", "agreement_with_torch_min", "difference_to_torch_max"):
            row.pop(key, None)
    older = results.table_page(document)
    assert "kB" not in older and "simulation" not in older

    document["compared_images"] = 1234
    for n, row in enumerate(rows):
        row |= {"file_bytes": 1_000_400 + 1000 * n, "agreement_with_torch_min": None, "difference_to_torch_max": 1e-6}
    rows[0] |= {"agreement_with_torch_min": 100.0}
    rows[-1] |= {"variant": "rounded", "agreement_with_torch_min": 99.951, "difference_to_torch_max": 0.0321}
    page = results.table_page(document).splitlines()
    header, line, first, *_ = (text for text in page if text.startswith("|"))
    assert header.endswith("| speed | kB |") and first.endswith(" | 1,000 |")
    assert header.count("|") == line.count("|") == first.count("|")
    told = [text for text in page if "simulation" in text]
    assert told == [
        "- teacher fp32 gives the class of its simulation in torch on at least 100.00% of 1,234 validation images with every "
        "seed; logits differ by 1e-06 at most.",
        "- student int8, rounded, gives the class of its simulation in torch on at least 99.95% of 1,234 validation images with "
        "every seed; logits differ by 0.0321 at most.",
    ]


def test_the_pages_of_benchmarks_are_printed_from_their_json(results: ModuleType) -> None:
    for path, page in results.MEASURED.items():
        document = json.loads(path.read_text(encoding="utf-8"))
        assert path.with_suffix(".md").read_text(encoding="utf-8") == page(document), path.name


def test_the_page_of_latencies_does_without_openvino(results: ModuleType) -> None:
    (path,) = (path for path in results.MEASURED if path.name == "deploy.json")
    document = json.loads(path.read_text(encoding="utf-8"))
    del document["versions"]["openvino"]
    page = results.deploy_page(document)
    assert "## onnxruntime" in page and "openvino" not in page


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


def test_the_settings_that_differ_from_the_recipe_are_derived(results: ModuleType) -> None:
    assert results.settings(LIMITED, load_recipes(LIMITED)) == []
    given = ["data.limit=2000", "networks.teacher.fit.epochs=1", "networks.student.fit.batch_size=16", "bench.rounds=7"]
    given += ["networks.student.fit.optimizer=sgd", "seeds=[5, 6]"]
    assert set(results.settings(LIMITED, load_recipes(LIMITED, given))) == {*given, "networks.student.fit.momentum=0.9"}


def test_the_dataset_is_a_setting_as_well(results: ModuleType) -> None:
    path = ROOT / "recipes" / "slides_mlp.yaml"
    given = ["data.name=fashion-mnist", "data.limit=9000", "seed=3", "reference=[]"]
    made = [one for one in load_recipes(path, given) if one.variant == "hidden300"]
    assert results.settings(path, made) == given


def test_what_a_variant_was_given_for_itself_is_a_setting_of_that_variant(results: ModuleType) -> None:
    path = ROOT / "recipes" / "slides_resnet.yaml"
    few = {"networks.student.model": "resnet-1-1-1-1-s2", "networks.student.view": {"per_class": 50}}
    given = [
        f"variants.few={json.dumps(few)}",
        "data.name=fashion-mnist",
        "data.limit=2000",
        "data.as=rgb32",
        "reference=[]",
    ]
    assert results.settings(path, load_recipes(path, given)) == given


def test_runs_that_no_settings_lead_to_are_refused(results: ModuleType) -> None:
    made = load_recipes(LIMITED)
    renamed = made[0].model_copy(update={"name": "limited/other.seed0", "variants": {"other": {}}})
    with pytest.raises(KdedgeError, match=r"limited\.yaml has changed since these runs were made"):
        results.settings(LIMITED, [renamed])
    with pytest.raises(KdedgeError, match=r"limited\.yaml has changed since these runs were made"):
        results.settings(LIMITED, [made[0], load_recipes(LIMITED, ["data.limit=2000"])[-1]])


def test_mistakes_are_told_in_a_sentence(results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["results.py", "table", "--runs", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="nowhere is not a run: it has no run.json"):
        results.main()
