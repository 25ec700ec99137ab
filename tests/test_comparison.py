"""`results`: the runs of a recipe in one table, held against what `bench` wrote for each of them."""

from __future__ import annotations

import io
import json
import os
import runpy
import shutil
import statistics
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from tiny_export import write_data, write_export

from kdedge.cli import main
from kdedge.comparison import (
    Difference,
    ResultRow,
    Results,
    classes_to_print,
    confusions_to_print,
    results,
    rows_to_print,
    sentences,
)
from kdedge.errors import KdedgeError, RunError
from kdedge.measurements import _whole

ROOT = Path(__file__).parent.parent
LARGE = {"networks.student.model": "mlp-64", "networks.student.fit.epochs": 4}
STUDY = """
name: study
data: {name: fashion-mnist, validation: 200, calibration: 40}
seeds: [3, 4]
networks:
  teacher: {model: mlp-32, fit: {epochs: 2}}
  student: {model: mlp-8, learns: [{from: teacher, loss: kd}], fit: {epochs: 1}}
variants:
  small: {}
  large: {networks.student.model: mlp-64, networks.student.fit.epochs: 4}
reference: [{network: student, variant: large, accuracy: 97.26, printed: the slides}]
deploy: {int8: {max_drop_points: 100}}
bench: {rounds: 1, seconds: 0.01}
"""
RUNS = ("small.seed3", "small.seed4", "large.seed3", "large.seed4")
NOTHING = Results(
    recipe="r",
    quick=False,
    classes=[],
    rows=[],
    differences=[],
    timing=[],
    own_cpu_share=[1.0],
    missing=[],
    left_out={},
)


def kdedge(*arguments: object) -> Result:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="kdedge")
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two variants and two seeds, distilled, exported and measured by the command line; nobody changes it."""
    folder = tmp_path_factory.mktemp("study")
    data = write_data(folder / "data", 400)
    (folder / "study.yaml").write_text(STUDY)
    runs = folder / "runs"
    kdedge("distill", folder / "study.yaml", "--runs", runs, "--data-dir", data, "--device", "cpu")
    kdedge("export", runs / "study", "--int8", "--data-dir", data)
    kdedge("bench", "--runs", runs, "--data-dir", data)
    return runs / "study"


@pytest.fixture
def study(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "study"))


WHO = "student merged int8"
IS_NO_CLASS = f": '{WHO}' is not a class from 0 to 9 for each of 400 images"


def saved(save: Callable[..., None], **arrays: Any) -> bytes:
    content = io.BytesIO()
    save(content, **arrays)
    return content.getvalue()


def validation(study: Path, run: str) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((study / run / "validation.json").read_text())["rows"]
    return {(row["network"], row["precision"]): row for row in rows}


def row(found: Results, variant: str | None, network: str, precision: str) -> ResultRow:
    (only,) = [r for r in found.rows if (r.variant, r.network, r.precision) == (variant, network, precision)]
    return only


def answer(run: Path, *, wrong: int) -> None:
    """Let the student of a run answer all test images rightly but the first ones."""
    content = dict(np.load(run / "predictions.npz"))
    for precision in ("fp32", "int8"):
        answers = content["labels"].copy()
        answers[:wrong] = (answers[:wrong] + 1) % 10
        content[f"student merged {precision}"] = answers
    np.savez(run / "predictions.npz", **content)


def test_each_variant_with_each_seed_is_a_run_and_the_teacher_is_trained_once_a_seed(study: Path) -> None:
    assert sorted(path.parent.name for path in study.glob("*/run.json")) == sorted(RUNS)
    teachers = {
        json.loads(file.read_text())["weights_sha256"]: file.stat().st_ino
        for file in sorted(study.glob("*/stages/fit-teacher-*/stage.json"))
    }
    assert len(teachers) == 2


def test_accuracies_are_those_that_bench_measured(study: Path) -> None:
    found = results(study)
    for variant, network in ((None, "teacher"), ("small", "student"), ("large", "student")):
        for precision in ("fp32", "int8"):
            seen = [validation(study, f"{variant or 'small'}.seed{seed}")[network, precision] for seed in (3, 4)]
            of_both = row(found, variant, network, precision)
            assert (of_both.seeds, of_both.n) == ([3, 4], 400)
            assert of_both.accuracy == [one["accuracy"] for one in seen]
            assert of_both.accuracy_mean == pytest.approx(statistics.mean(of_both.accuracy), abs=1e-4)
            assert of_both.accuracy_sd == pytest.approx(statistics.stdev(of_both.accuracy), abs=1e-4)
            assert np.trace(of_both.confusion) == sum(one["correct"] for one in seen)
            assert np.sum(of_both.confusion) == 800
    assert len(found.rows) == 6  # the teacher is the same in both variants and comes once


def test_a_row_has_the_size_of_its_files_and_the_least_parity_over_seeds(study: Path) -> None:
    told = {3: (1000, 99.95, 0.25), 4: (2001, 100.0, 0.5)}
    for seed, (size, agreement, difference) in told.items():
        manifest = study / f"large.seed{seed}" / "export" / "manifest.json"
        files = json.loads(manifest.read_text())["files"]
        (n,) = (n for n, one in enumerate(files) if (one["role"], one["precision"]) == ("merged", "int8"))
        said = {"bytes": size, "agreement_with_torch": agreement, "difference_to_torch": difference}
        rewrite(manifest, **{f"files__{n}__{key}": value for key, value in said.items()})
    found = results(study)
    quantized, calibrated = (row(found, variant, "student", "int8") for variant in ("large", "small"))
    assert quantized.file_bytes == 1500  # the mean
    assert (quantized.agreement_with_torch_min, quantized.difference_to_torch_max) == (99.95, 0.5)
    assert (calibrated.agreement_with_torch_min, calibrated.difference_to_torch_max) == (None, None)
    sizes = [
        (study / run / "export" / "student.merged.int8.onnx").stat().st_size for run in ("small.seed3", "small.seed4")
    ]
    assert calibrated.file_bytes == round(statistics.mean(sizes))


def test_a_row_that_was_written_before_sizes_were_has_none(study: Path) -> None:
    older = row(results(study), "small", "student", "int8").model_dump()
    for key in ("file_bytes", "agreement_with_torch_min", "difference_to_torch_max"):
        del older[key]
    assert ResultRow.model_validate(older).file_bytes is None


def test_accuracy_of_each_class_and_what_it_is_taken_for() -> None:
    row = dict(network="student", parameters=1, seeds=[0], accuracy=[60.0], accuracy_mean=60.0, accuracy_sd=None, n=10)
    row |= dict(train_s=1.0, speedup=None, speedup_sd=None, reference=[])
    row |= dict(confusion=[[3, 1, 0], [0, 0, 0], [1, 2, 3]])
    rows = [ResultRow(variant="a", precision=precision, **row) for precision in ("fp32", "int8")]
    found = NOTHING.model_copy(update={"classes": ["Trouser", "Bag", "Dress"], "rows": rows})
    header = ["Trou", "Bag", "Dres"]
    assert classes_to_print(found) == (["% of class", *header], [["student a", "75.0", "0.0", "50.0"]])  # of int8 alone
    (matrix,) = confusions_to_print(found)
    assert matrix == (
        ["student a", *header],
        [["Trouser", "75.0", "25.0", ""], ["Bag", "", "", ""], ["Dress", "16.7", "33.3", "50.0"]],
    )


def test_tables_of_classes_fit_into_a_terminal(study: Path) -> None:
    """Of three networks: the table of results, one over classes, and three matrices; the sentences come last."""
    plain, *tables, said = kdedge("results", study, "--per-class", "--confusion").output.split("\n\n")
    assert plain.startswith("network ") and said.startswith("- ")
    assert [table.split()[0] for table in tables] == ["%", "teacher", "student", "student"]
    assert [len(table.splitlines()) for table in tables] == [4, 11, 11, 11]
    assert max(len(line) for table in tables for line in table.splitlines()) <= 80
    assert "\n\n" not in kdedge("results", study).output


def test_the_difference_of_two_seeds_has_students_interval(study: Path) -> None:
    for seed, wrong in ((3, 200), (4, 40)):  # seeds so far apart that the noise of the images is less
        answer(study / f"small.seed{seed}", wrong=wrong)
        answer(study / f"large.seed{seed}", wrong=0)
    found = results(study)
    assert [(one.variant, one.baseline, one.network, one.precision) for one in found.differences] == [
        ("large", "small", "student", "fp32"),
        ("large", "small", "student", "int8"),
    ]
    gains = np.subtract(
        row(found, "large", "student", "fp32").accuracy, row(found, "small", "student", "fp32").accuracy
    )
    half = 12.7062 * gains.std(ddof=1) / np.sqrt(2)  # 97.5% quantile of Student's t, one degree of freedom
    one = found.differences[0]
    assert (one.seeds, one.p_value) == (2, None)
    assert one.points == pytest.approx(gains.mean(), abs=1e-3)
    assert one.ci95_points == pytest.approx((gains.mean() - half, gains.mean() + half), abs=1e-2)
    assert one.distinguishable == (abs(gains.mean()) > half)


def test_two_seeds_that_agree_by_luck_leave_the_noise_of_the_images(study: Path) -> None:
    """Three images of 400, the same ones with both seeds: Student's interval would have no width."""
    for seed in (3, 4):
        answer(study / f"small.seed{seed}", wrong=3)
        answer(study / f"large.seed{seed}", wrong=0)
    one = results(study).differences[0]
    half = 196 * np.sqrt(3 + 1 - 9 / 402) / 402  # Agresti and Min 2005
    assert (one.points, one.distinguishable) == (0.75, False)
    assert one.ci95_points == pytest.approx((0.75 - half, 0.75 + half), abs=1e-3)


def test_another_variant_can_be_the_one_to_compare_with(study: Path) -> None:
    usual, turned = results(study).differences, results(study, "large").differences
    assert [(one.variant, one.baseline) for one in turned] == [("small", "large")] * 2
    assert results(study, "large", "small").differences == turned  # no two are compared twice
    assert [one.points for one in turned] == [-one.points for one in usual]
    with pytest.raises(RunError, match="unknown variant 'larg'; did you mean 'large'"):
        results(study, "larg")


def test_with_one_seed_the_test_images_are_compared(study: Path) -> None:
    for run in ("small.seed4", "large.seed4"):
        shutil.rmtree(study / run)
    (one, _) = results(study).differences
    right = [
        (lambda content: content["student merged fp32"] == content["labels"])(np.load(study / run / "predictions.npz"))
        for run in ("small.seed3", "large.seed3")
    ]
    assert (one.seeds, one.points) == (1, pytest.approx(100 * (right[1].mean() - right[0].mean())))
    assert one.p_value is not None and one.ci95_points is None  # what is printed is what decides
    assert one.distinguishable == (one.p_value < 0.05)
    assert f"{one.points:+.2f} points (McNemar p = {one.p_value:.2g})" in " ".join(sentences(results(study)))


def test_printed_figures_stand_beside_their_variant(study: Path) -> None:
    found = results(study)
    assert [known.accuracy for known in row(found, "large", "student", "int8").reference] == [97.26]
    assert row(found, "small", "student", "int8").reference == []
    assert "Printed: the slides." in sentences(found)


def test_the_table_and_the_file(study: Path) -> None:
    header, table = rows_to_print(results(study))
    assert header[:3] == ["network", "params", "seeds"]
    assert [line[0] for line in table] == ["teacher", "student small", "student large"]
    assert table[2][5] == "97.26"
    assert Results.model_validate_json((study / "results.json").read_text()) == results(study)
    printed = kdedge("results", study).stdout.splitlines()
    assert printed[0].split()[0] == "network"
    assert json.loads(kdedge("results", study, "--json").stdout) == results(study).model_dump(mode="json")
    assert max(map(len, printed[:4])) <= 80


def test_a_single_run_is_named_by_its_variant_and_keeps_what_is_printed_of_it(study: Path) -> None:
    found = results(study / "large.seed3")
    assert [(one.variant, one.network, one.precision) for one in found.rows] == [
        ("large", network, precision) for network in ("teacher", "student") for precision in ("fp32", "int8")
    ]
    assert [known.accuracy for known in row(found, "large", "student", "int8").reference] == [97.26]
    assert found.differences == []


def test_what_two_variants_share_comes_once_whatever_seeds_are_measured(study: Path) -> None:
    """With seed 4 of one variant only, the teacher is one network still, and is not compared with itself."""
    (study / "small.seed4" / "bench.json").unlink()
    found = results(study)
    assert row(found, None, "teacher", "int8").seeds == [3, 4]
    assert row(found, "small", "student", "int8").seeds == [3]
    assert [(one.network, one.precision, one.seeds) for one in found.differences] == [
        ("student", "fp32", 1),
        ("student", "int8", 1),
    ]


def test_without_a_seed_in_common_nobody_knows_what_is_shared(study: Path) -> None:
    for run in ("small.seed4", "large.seed3"):
        (study / run / "bench.json").unlink()
    found = results(study)
    assert [(one.network, one.variant) for one in found.rows if one.precision == "int8"] == [
        ("teacher", "small"),
        ("teacher", "large"),
        ("student", "small"),
        ("student", "large"),
    ]
    assert found.differences == []


def rewrite(file: Path, *, later_s: float = 0, **changes: Any) -> None:
    """Change what a JSON file says, and the time at which it was written."""
    document, written = json.loads(file.read_text()), file.stat().st_mtime
    for path, value in changes.items():
        *parents, last = (int(key) if key.isdecimal() else key for key in path.split("__"))
        reduce(lambda node, key: node[key], parents, document)[last] = value
    file.write_text(json.dumps(document))
    os.utime(file, (written + later_s,) * 2)


def test_runs_of_another_version_of_the_recipe_are_left_out(study: Path) -> None:
    rewrite(study / "small.seed3" / "run.json", recipe__networks__student__fit__epochs=7, later_s=-100)
    found = results(study)
    assert found.left_out == {str(study / "small.seed3"): "made by another version of the recipe"}
    assert row(found, "small", "student", "int8").seeds == [4]
    assert f"Left out, made by another version of the recipe: {study / 'small.seed3'}." in sentences(found)


def test_a_variant_that_the_newest_recipe_does_not_have_is_left_out(study: Path) -> None:
    rewrite(study / "large.seed4" / "run.json", recipe__variants={"large": LARGE}, later_s=100)
    found = results(study)
    assert sorted(found.left_out) == [str(study / f"small.seed{seed}") for seed in (3, 4)]
    assert {one.variant for one in found.rows} == {"large"}


@pytest.mark.parametrize(
    "change",
    [
        {"recipe__networks__teacher__fit__epochs": 7},
        {"recipe__networks__student__learns__0__temperature": 7},
        {"recipe__networks__student__fit__lr": 0.5},
        {"recipe__data__limit": 300},
        {"recipe__deploy__int8__max_drop_points": 3},
        {"recipe__variants__large": LARGE | {"networks.student.fit.epochs": 5}},
    ],
    ids=["teacher", "field that no variant changes", "part of one that a variant changes", "data", "deploy", "variant"],
)
def test_variants_of_two_versions_are_not_compared(study: Path, change: dict[str, Any]) -> None:
    for run in ("small.seed3", "small.seed4"):
        rewrite(study / run / "run.json", **change, later_s=100)
    found = results(study)
    left_out = {str(study / f"large.seed{seed}"): "made by another version of the recipe" for seed in (3, 4)}
    assert (found.left_out, found.differences) == (left_out, [])


def test_variants_may_differ_in_what_they_change_and_all_that_comes_with_it(study: Path) -> None:
    """`fit.optimizer: sgd` brings a momentum along, and `view.fraction` a whole view."""
    changes = {"networks.student.fit.optimizer": "sgd", "networks.student.view.fraction": 0.5}
    for run in RUNS:
        name = study / run / "run.json"
        rewrite(name, recipe__variants__large=changes, recipe__networks__student__model="mlp-8")
        rewrite(name, recipe__networks__student__fit__epochs=1)
        if run.startswith("large"):
            rewrite(name, recipe__networks__student__fit__optimizer="sgd")
            rewrite(
                name, recipe__networks__student__fit__momentum=0.9, recipe__networks__student__view={"fraction": 0.5}
            )
    assert results(study).left_out == {}


def test_a_copy_of_a_run_is_no_other_version(study: Path) -> None:
    copy = Path(shutil.copytree(study / "small.seed3", study / "small.seed3.bak"))
    rewrite(copy / "run.json", later_s=100)
    why = f"as {copy} is a newer run of the same variant and seed"
    found = results(study)
    assert found.left_out == {str(study / "small.seed3"): why}
    assert f"Left out, {why}: {study / 'small.seed3'}." in sentences(found)


def test_a_newer_copy_that_is_not_measured_takes_no_place(study: Path) -> None:
    copy = Path(shutil.copytree(study / "small.seed3", study / "small.seed3.bak"))
    rewrite(copy / "run.json", later_s=100)
    (copy / "bench.json").unlink()
    found = results(study)
    assert (found.left_out, found.missing) == ({}, [str(copy)])
    assert row(found, "small", "student", "int8").seeds == [3, 4]


def test_a_newer_quick_copy_takes_no_place(study: Path) -> None:
    copy = Path(shutil.copytree(study / "small.seed3", study / "small.seed3.bak"))
    rewrite(copy / "run.json", quick=True, later_s=100)
    rewrite(study / "large.seed4" / "run.json", later_s=200)
    assert results(study).left_out == {str(copy): "made with --quick"}


def test_quick_runs_and_others_are_not_mixed(study: Path) -> None:
    rewrite(study / "large.seed4" / "run.json", quick=True, later_s=100)
    found = results(study)
    assert found.quick and set(found.left_out.values()) == {"made without --quick"} and len(found.left_out) == 3
    assert sentences(found)[0].startswith("These runs were --quick: their accuracies mean nothing")
    rewrite(study / "large.seed4" / "run.json", later_s=-1000)
    assert results(study).left_out == {str(study / "large.seed4"): "made with --quick"}


def test_a_page_of_a_single_run_but_none_of_quick_ones(study: Path) -> None:
    table = runpy.run_path(str(ROOT / "tools" / "results.py"))["table"]
    table.__globals__["ROOT"] = study.parent
    (study.parent / "recipes").mkdir()
    (study.parent / "recipes" / "study.yaml").write_text(STUDY.replace("fashion-mnist,", "mnist,"))
    single = table(study / "small.seed3")
    assert (single["images"], single["settings"]) == (160, ["data.name=fashion-mnist", "seeds=[3]"])
    assert single["compared_images"] == 200  # all that there are for validation
    for run in RUNS:
        rewrite(study / run / "run.json", quick=True)
    with pytest.raises(KdedgeError, match="was made with --quick: its accuracies mean nothing"):
        table(study)


@pytest.mark.parametrize(
    ("file", "change", "differs"),
    [
        ("bench.json", {"device__cpu": "Z80"}, "device.cpu=Z80"),
        ("bench.json", {"device__onnxruntime": "9.9"}, "versions.onnxruntime=9.9"),
        ("export/manifest.json", {"versions__torch": "9.9"}, "versions.torch=9.9"),
        ("run.json", {"data__train": 9}, "images=9"),
    ],
)
def test_a_page_is_of_one_machine_one_set_of_versions_and_the_same_images(
    study: Path, file: str, change: dict[str, Any], differs: str
) -> None:
    table = runpy.run_path(str(ROOT / "tools" / "results.py"))["table"]
    table.__globals__["ROOT"] = study.parent
    (study.parent / "recipes").mkdir()
    (study.parent / "recipes" / "study.yaml").write_text(STUDY)
    rewrite(study / "large.seed4" / "bench.json", device__load_average_1min=99.5)  # does not matter
    assert table(study)["images"] == 160
    rewrite(study / "large.seed4" / file, **change)
    with pytest.raises(KdedgeError) as error:
        table(study)
    assert str(error.value).startswith(f"{study / 'large.seed4'} has {differs}, unlike {study / 'small.seed3'}; ")


def speedups(study: Path, run: str) -> dict[tuple[str, str], float]:
    rows = json.loads((study / run / "bench.json").read_text())["rows"]
    return {(one["network"], one["precision"]): one["speedup"] for one in rows if one["role"] in ("teacher", "merged")}


def busy(study: Path, *names: str) -> None:
    """Say of these runs that something else ran while they were measured, and of no other."""
    for run in RUNS:
        rewrite(study / run / "bench.json", own_cpu_share=0.9 if run in names else 1.0)


def test_speeds_have_a_spread(study: Path) -> None:
    busy(study)
    seen = [speedups(study, run)["student", "int8"] for run in ("large.seed3", "large.seed4")]
    found = results(study)
    assert row(found, "large", "student", "int8").speedup == pytest.approx(statistics.mean(seen), abs=1e-4)
    assert row(found, "large", "student", "int8").speedup_sd == pytest.approx(statistics.stdev(seen), abs=1e-4)
    assert [one.model_dump() for one in found.timing] == [{"rounds": 1, "seconds": 0.01, "threads": 1}]


def test_a_busy_machine_is_named_and_its_speeds_left_out(study: Path) -> None:
    busy(study, "large.seed3", "small.seed3", "small.seed4")
    found = results(study)
    one, none = (row(found, variant, "student", "int8") for variant in ("large", "small"))
    assert one.speedup == pytest.approx(speedups(study, "large.seed4")["student", "int8"], abs=1e-4)
    assert (one.speedup_sd, none.speedup) == (None, None)
    assert sentences(found)[0] == (
        "Something else kept the processor busy during 3 of 4 measurements: their speeds are left out, and training may "
        "have taken longer than on an idle machine."
    )


def test_a_shared_network_has_the_speed_that_any_of_its_runs_measured(study: Path) -> None:
    busy(study)
    for run in ("small.seed3", "small.seed4"):
        file = study / run / "bench.json"
        document = json.loads(file.read_text())
        for one in document["rows"]:
            one["speedup"] = None  # as where nothing has a teacher
        file.write_text(json.dumps(document))
    seen = [speedups(study, run)["teacher", "int8"] for run in ("large.seed3", "large.seed4")]
    assert row(results(study), None, "teacher", "int8").speedup == pytest.approx(statistics.mean(seen), abs=1e-4)


def test_a_difference_within_its_noise_is_called_so() -> None:
    def said(points: float, low: float, high: float, distinguishable: bool) -> str:
        one = Difference(
            variant="b",
            baseline="a",
            network="student",
            precision="int8",
            points=points,
            ci95_points=(low, high),
            seeds=3,
            p_value=None,
            distinguishable=distinguishable,
        )
        return sentences(NOTHING.model_copy(update={"differences": [one]}))[0]

    assert said(0.2, -0.4, 0.8, False) == (
        "student int8, b against a: +0.20 points (-0.40 to +0.80, 3 seeds): not distinguishable."
    )
    assert said(1.2, 0.4, 2, True) == "student int8, b against a: +1.20 points (+0.40 to +2.00, 3 seeds)."


def test_the_gate_of_one_run_does_not_stop_the_others(study: Path, finished: Path) -> None:
    file = study / "small.seed4" / "run.json"
    document = json.loads(file.read_text())
    document["recipe"]["deploy"]["int8"]["max_drop_points"] = 0
    file.write_text(json.dumps(document))
    for run in RUNS:
        shutil.rmtree(study / run / "export")
    command = ["export", str(study), "--int8", "--data-dir", str(finished.parent.parent / "data")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 3
    assert done.stderr.count("could not be validated") == 1 and f"{study / 'small.seed4' / 'export'}" in done.stderr
    assert all((study / run / "export" / "manifest.json").is_file() for run in RUNS)
    assert [line for line in done.stdout.splitlines() if "/" in line] == [
        "study/large.seed3",
        "study/large.seed4",
        "study/small.seed3",
    ]


def test_runs_that_are_not_measured_are_named(study: Path) -> None:
    (study / "large.seed4" / "predictions.npz").unlink()
    found = results(study)
    assert found.missing == [str(study / "large.seed4")]
    assert row(found, "large", "student", "int8").seeds == [3]
    assert f"Not measured yet: {study / 'large.seed4'}." in sentences(found)


def test_a_measurement_of_another_export_is_none(study: Path) -> None:
    rewrite(study / "large.seed3" / "export" / "manifest.json", files__0__sha256="0" * 64)
    rewrite(study / "large.seed4" / "run.json", stages__0__key="0" * 64)  # trained again since
    assert results(study).missing == [str(study / f"large.seed{seed}") for seed in (3, 4)]


def test_nothing_measured(study: Path) -> None:
    for run in RUNS:
        (study / run / "predictions.npz").unlink()
    with pytest.raises(RunError, match="Nothing in .* is measured yet. First: kdedge export"):
        results(study)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda whole, arrays: whole[:100], ""),
        (lambda whole, arrays: b"garbage", ""),
        (lambda whole, arrays: saved(np.save, arr=arrays["labels"]), ""),
        (lambda whole, arrays: saved(np.savez, **{**arrays, WHO: arrays[WHO][:9]}), IS_NO_CLASS),
        (lambda whole, arrays: saved(np.savez, **{**arrays, WHO: arrays[WHO] + 9}), IS_NO_CLASS),
        (lambda whole, arrays: saved(np.savez, **{**arrays, WHO: arrays[WHO] / 2}), IS_NO_CLASS),
        (lambda whole, arrays: saved(np.savez, labels=arrays["labels"]), ""),
    ],
    ids=["cut", "garbage", "one array", "short", "class 10", "floats", "labels alone"],
)
def test_damaged_predictions_are_refused(study: Path, damage: Callable[[bytes, Any], bytes], said: str) -> None:
    run = study / "small.seed3"
    file = run / "predictions.npz"
    file.write_bytes(damage(file.read_bytes(), dict(np.load(file))))
    with pytest.raises(RunError) as error:
        results(study)
    assert str(error.value) == f"{file} is damaged{said}. Measure again: kdedge bench {run}"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("bench.json", {}, "rows: missing. Measure again: kdedge bench"),
        ("bench.json", {"rows": [{}], "seconds": 1, "own_cpu_share": 1}, "rows.0.network: missing"),
        ("stages/fit-teacher-*/stage.json", {}, "seconds: missing"),
    ],
)
def test_damaged_documents_are_refused(study: Path, name: str, content: dict[str, Any], said: str) -> None:
    (file,) = (study / "small.seed3").glob(name)
    file.write_text(json.dumps(content))
    with pytest.raises(RunError) as error:
        results(study)
    assert str(error.value).startswith(f"{file} is damaged: {said}")


def test_of_several_forms_of_int8_the_one_that_ships_on_this_cpu_is_int8(tmp_path: Path) -> None:
    manifest = write_export(tmp_path)
    int8 = next(file for file in manifest.files if (file.role, file.precision) == ("teacher", "int8"))
    manifest.files.append(int8.model_copy(update={"precision": "int8-u8u8", "path": "other.onnx"}))
    for ships, form in (({}, "int8"), ({"x86-avx2": ["other.onnx"]}, "int8-u8u8"), ({"arm64": ["other.onnx"]}, "int8")):
        manifest.ships = ships
        found = _whole(manifest, "x86-avx2")
        assert (found["teacher", "int8"].precision, found["teacher", "fp32"].precision) == (form, "fp32")
    manifest.files.remove(int8)
    assert _whole(manifest, "x86-avx2")["teacher", "int8"].path == "other.onnx"
