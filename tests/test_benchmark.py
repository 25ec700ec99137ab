"""The whole bench on a tiny run with real files and processes, and the sentences on figures that are known."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_export import write_data, write_run

from kdedge import devices
from kdedge.bench_report import BenchReport, BenchRow, rows_for_print, sentences
from kdedge.benchmark import bench
from kdedge.devices import local
from kdedge.errors import DataError, DeviceError, RecipeError, RunError
from kdedge.manifest import ValidationRow, read_manifest
from kdedge.recommendation import FormRow
from kdedge.store import open_run, write_json
from kdedge.validate import Validation

N = 200


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), N)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "tiny", data_dir, quick=True).path


@pytest.fixture(scope="module")
def said() -> list[str]:
    return []


@pytest.fixture(scope="module")
def report(folder: Path, data_dir: Path, said: list[str]) -> BenchReport:
    return bench(folder, data_dir=data_dir, progress=said.append)


def test_there_is_a_row_for_every_file_with_the_promised_keys(report: BenchReport, folder: Path) -> None:
    document = json.loads((folder / "bench.json").read_text())
    keys = "network role precision threads batch n latency_ms_p50 latency_ms_p90 latency_ms_p99 cold_start_ms"
    keys += " peak_rss_bytes file_bytes sha256 latency_ms_p50_ci95 latency_ms_p90_ci95 latency_ms_p99_ci95"
    keys += " speedup speedup_ci95 round_p50_ms settled"
    assert all(list(row) == keys.split() for row in document["rows"])
    files = json.loads((folder / "export" / "manifest.json").read_text())["files"]
    told = ("network", "role", "precision", "sha256")
    assert [(*(row[key] for key in told), row["file_bytes"]) for row in document["rows"]] == [
        (*(file[key] for key in told), file["bytes"]) for file in files
    ]
    assert document["device"]["cpu_class"] and document["empty_runner_rss_bytes"] > 10e6
    assert document == report.model_dump(mode="json", exclude={"validation"})


def test_figures_agree_with_each_other(report: BenchReport) -> None:
    for row in report.rows:
        assert (row.threads, row.batch, len(row.round_p50_ms)) == (1, 1, 2)
        assert row.n >= 200  # at least MIN_RUNS in each round
        assert row.latency_ms_p50_ci95 and row.latency_ms_p90_ci95
        assert row.latency_ms_p50_ci95[0] <= row.latency_ms_p50 <= row.latency_ms_p50_ci95[1]
        assert row.latency_ms_p50 <= row.latency_ms_p90
        assert (row.latency_ms_p99 is None) == (row.latency_ms_p99_ci95 is None)
        assert min(row.round_p50_ms) <= row.latency_ms_p50 <= max(row.round_p50_ms)
        assert row.cold_start_ms > row.latency_ms_p50
        assert 0 < row.peak_rss_bytes < 100e6
        assert row.speedup_ci95 and row.speedup and row.speedup_ci95[0] <= row.speedup <= row.speedup_ci95[1]
    assert (report.rows[0].role, report.rows[0].speedup) == ("teacher", 1.0)


def test_validation_is_on_the_test_split_and_is_written(report: BenchReport, folder: Path) -> None:
    document = json.loads((folder / "validation.json").read_text())
    assert document == report.validation.model_dump(mode="json")
    assert {(row["split"], row["n"]) for row in document["rows"]} == {("test", N)}
    accuracy = {(row["network"], row["role"], row["precision"]): row["accuracy"] for row in document["rows"]}
    assert accuracy["teacher", "teacher", "int8"] == 90 and accuracy["students", "merged", "int8"] == 80


def test_progress_says_what_is_being_measured(report: BenchReport, said: list[str]) -> None:
    assert said == [
        "accuracy on 200 test images",
        "latency of 10 files, round 1 of 2",
        "latency of 10 files, round 2 of 2",
        "cold start and memory of 10 files, runs of each: 1",
    ]


def test_a_quick_run_is_measured_on_few_images(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdedge.benchmark.QUICK_IMAGES", 50)
    for quick, n in ((True, 50), (False, N)):
        run = write_run(tmp_path / str(quick), data_dir, quick=quick, rounds=1)
        assert {row.n for row in bench(run, data_dir=data_dir).validation.rows} == {n}
        assert len(np.load(run.path / "predictions.npz")["labels"]) == n


def test_a_quick_run_says_so_first(report: BenchReport) -> None:
    assert report.verdicts[0].startswith("This run was --quick: its accuracies mean nothing")


def test_the_table_fits_80_columns_and_folds_the_members(report: BenchReport) -> None:
    header, lines = rows_for_print(report)
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    assert sum(widths) + 2 * (len(header) - 1) <= 80
    assert [line[0] for line in lines[:4]] == [
        "teacher teacher fp32",
        "students merged fp32",
        "students head fp32",
        "students member fp32 x2",
    ]
    assert lines[0][1] == "100.00 ±0.94" and lines[3][1] == ""  # Wilson: 200 of 200 is at least 98.12
    assert lines[0][5] == "1.00x" and lines[3][5] == "-"


def test_settings_that_are_none_are_refused(data_dir: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny", data_dir)
    run.recipe["bench"]["rounds"] = "x"
    run.write()
    with pytest.raises(
        RecipeError, match=r"run\.json: bench\.rounds: expected a whole number from 1 to 1,000, got 'x'"
    ):
        bench(run.path, data_dir=data_dir)


def test_other_data_than_the_run_was_distilled_on_is_refused(folder: Path, tmp_path: Path) -> None:
    other = write_data(tmp_path, N + 1)
    with pytest.raises(DataError, match="is not the data of this run"):
        bench(folder, data_dir=other)


def test_mistakes_are_told_before_anything_is_measured(folder: Path, tmp_path: Path, data_dir: Path) -> None:
    with pytest.raises(DeviceError, match="There is no device 'gpu'"):
        bench(folder, device="gpu")
    with pytest.raises(RunError, match="is not a run"):
        bench(tmp_path)
    with pytest.raises(DataError, match="--data-dir"):
        bench(folder, data_dir=tmp_path / "nowhere")
    shutil.copy(folder / "run.json", tmp_path)
    with pytest.raises(RunError, match="is no export"):
        bench(open_run(tmp_path), data_dir=data_dir)


def test_a_device_that_answers_for_other_files_is_not_believed(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdedge.devices import DEVICES, local

    def liar(job: Any, files: Any) -> dict[str, Any]:
        answer = local.run(job, files)
        if job["task"] == "latency":
            answer["graphs"].reverse()
        return answer

    monkeypatch.setitem(DEVICES, "liar", liar)
    run = write_run(tmp_path / "tiny", data_dir, rounds=1)
    with pytest.raises(DeviceError, match="answered for other files"):
        bench(run, device="liar", data_dir=data_dir)
    assert not (run.path / "bench.json").exists()


def test_threads_given_win_over_the_recipes(data_dir: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny", data_dir, rounds=1, seconds=1e-9)
    manifest = json.loads((run.path / "export" / "manifest.json").read_text())
    manifest["files"] = [file for file in manifest["files"] if file["role"] == "teacher"]
    write_json(run.path / "export" / "manifest.json", manifest)
    report = bench(run, threads=2, data_dir=data_dir)
    assert [row.threads for row in report.rows] == [2, 2]
    assert report.rows[0].speedup_ci95 is None  # one round tells nothing of the spread between rounds


def test_the_way_to_run_a_group_is_measured_and_written_into_the_manifest(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def three_of_many(job: Any, files: Any) -> dict[str, Any]:
        answer = local.run(job, files)
        answer["device"] |= {"cores": 64, "affinity": 3}
        return answer

    monkeypatch.setitem(devices.DEVICES, "cpu", three_of_many)
    run = write_run(tmp_path / "tiny", data_dir, rounds=3, seconds=1e-9)
    manifest = read_manifest(run.path / "export")
    merged = [file for file in manifest.files if file.role == "merged"]
    manifest.files += [file.model_copy(update={"role": "plain"}) for file in merged]
    write_json(run.path / "export" / "manifest.json", manifest.model_dump(mode="json"))
    for _ in range(2):  # the second time takes the place of the first
        report = bench(run, data_dir=data_dir)
        ways = [(row.form, row.precision, row.threads) for row in report.forms]
        kinds = [(form, precision) for precision in ("fp32", "int8") for form in ("one graph", "members")]
        kinds += [("one graph as trained", "fp32"), ("one graph as trained", "int8")]
        assert ways == [(*kind, n) for kind in kinds for n in (1, 3)]
        assert all(row.n >= 300 and len(row.round_p50_ms) == 3 for row in report.forms)
        chain = next(row for row in report.forms if row.form == "members")
        assert chain.files == ["students.0.fp32.onnx", "students.1.fp32.onnx", "head.fp32.onnx"]
        assert chain.file_bytes == sum((run.path / "export" / path).stat().st_size for path in chain.files)
        (recommended,) = read_manifest(run.path / "export").recommended
        assert recommended.network == "students" and recommended.cpu_class == report.device["cpu_class"]
        assert report.verdicts[-1] == recommended.why


def test_the_way_to_run_a_single_student_is_one_of_its_own_and_int8_has_to_ship(data_dir: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny", data_dir, rounds=3, seconds=1e-9)
    manifest = read_manifest(run.path / "export")
    manifest.files = [file for file in manifest.files if file.role in ("teacher", "merged")]
    write_json(run.path / "export" / "manifest.json", manifest.model_dump(mode="json"))
    report = bench(run, data_dir=data_dir)
    assert {(row.network, row.form) for row in report.forms} == {("students", "one graph")}
    (recommended,) = read_manifest(run.path / "export").recommended
    assert (recommended.files, recommended.precision) == (
        ["students.fp32.onnx"],
        "fp32",
    )  # nothing ships in this manifest
    assert "in int8 did not count: their files do not ship for" in recommended.why


# The figures of the prototype: the sentences that a user must see.


def row(network: str, role: str, precision: str, p50_ms: float, file_kb: int, *, spread: float = 0.01) -> BenchRow:
    rounds = [p50_ms * (1 + spread * step) for step in (-1, 0.5, 0, 1, -0.5)]
    return BenchRow(
        network=network,
        role=role,
        precision=precision,
        sha256="",
        threads=1,
        n=10_000,
        latency_ms_p50=p50_ms,
        latency_ms_p90=p50_ms * 1.1,
        latency_ms_p99=p50_ms * 1.3,
        cold_start_ms=5.0,
        peak_rss_bytes=12_000_000,
        file_bytes=1000 * file_kb,
        latency_ms_p50_ci95=(p50_ms, p50_ms),
        latency_ms_p90_ci95=None,
        latency_ms_p99_ci95=None,
        speedup=0.169 / p50_ms,
        speedup_ci95=None,
        round_p50_ms=rounds if precision == "fp32" else rounds[::-1],  # else every ratio would be exactly the same
        settled=True,
    )


def prototype(*rows: BenchRow, **changes: Any) -> BenchReport:
    known = {"device": {}, "empty_runner_rss_bytes": 0, "seconds": 1.0, "own_cpu_share": 1.0, "quick": False}
    known["verdicts"] = []
    accuracy = {"teacher": 9310, "students": 9136}
    validation = [
        ValidationRow(
            network=one.network,
            role=one.role,
            precision=one.precision,
            cpu_class="x86-vnni",
            split="test",
            n=10_000,
            correct=accuracy[one.network],
            accuracy=accuracy[one.network] / 100,
            accuracy_ci95=(0, 0),
        )
        for one in rows
        if one.role != "member"
    ]
    return BenchReport(**known | changes, rows=list(rows), validation=Validation(device={}, rows=validation))


TEACHER = row("teacher", "teacher", "fp32", 0.169, 9532), row("teacher", "teacher", "int8", 0.070, 2401)
STUDENTS = row("students", "merged", "fp32", 0.131, 370), row("students", "merged", "int8", 0.140, 98)
MEMBER = row("students.0", "member", "int8", 0.035, 24)


def test_slower_and_faster_choices_are_said_plainly() -> None:
    assert sentences(prototype(*TEACHER, *STUDENTS, MEMBER)) == [
        "teacher: int8 is 2.41 times as fast as fp32 (0.070 ms against 0.169 ms), in a file of 2,401 kB against "
        "9,532 kB.",
        "students in one graph: int8 is slower than fp32 here (0.140 ms against 0.131 ms). Ship fp32, unless size "
        "matters (98 kB against 370 kB).",
        "students in one graph (fp32, 0.131 ms): 1.29 times as fast as the teacher (fp32, 0.169 ms), "
        "with 1.74 points less accuracy.",
        "students in one graph (int8, 0.140 ms): slower than the teacher (int8, 0.070 ms), with 1.74 points less "
        "accuracy. On this device the teacher's int8 file is the simpler and faster choice.",
        "Fastest: teacher in int8 (0.070 ms, 93.10%, 2,401 kB); smallest: students in one graph in int8 "
        "(0.140 ms, 91.36%, 98 kB).",
    ]


def test_a_difference_within_the_noise_is_not_distinguishable() -> None:
    noisy = row("students", "merged", "fp32", 0.131, 370), row("students", "merged", "int8", 0.128, 98, spread=0.2)
    assert sentences(prototype(*noisy)) == [
        "students: int8 and fp32 are not distinguishable in speed after 5 rounds (0.128 ms against 0.131 ms). "
        "int8 only changes the size (98 kB against 370 kB)."
    ]


def test_one_round_says_that_it_cannot_tell() -> None:
    teacher, quantized = (row.model_copy(update={"round_p50_ms": row.round_p50_ms[:1]}) for row in TEACHER)
    warning, told = sentences(prototype(teacher, quantized))
    assert warning.startswith("One round has no spread") and "bench: {rounds: 5}" in warning
    assert told == "teacher: int8 and fp32 cannot be told apart in speed by one round (0.070 ms against 0.169 ms)."


def test_two_rounds_that_differ_leave_the_speed_open() -> None:
    noisy = row("students", "merged", "fp32", 0.131, 370), row("students", "merged", "int8", 0.128, 98, spread=0.2)
    (told,) = sentences(prototype(*(one.model_copy(update={"round_p50_ms": one.round_p50_ms[:2]}) for one in noisy)))
    assert told == "students: int8 and fp32 cannot be told apart in speed by two rounds (0.128 ms against 0.131 ms)."


def test_a_busy_machine_and_restless_times_are_said_first() -> None:
    restless = TEACHER[0].model_copy(update={"settled": False})
    first, second, *_ = sentences(prototype(restless, TEACHER[1], own_cpu_share=0.61))
    assert first.startswith("Something else kept the processor busy: the runner had 61% of its core.")
    assert second == "Times had not settled when measuring began: teacher teacher fp32."
    known = {"network": "students", "form": "members", "precision": "int8", "n": 100, "files": [], "file_bytes": 1}
    known |= {"latency_ms_p50": 0.1, "latency_ms_p50_ci95": None, "round_p50_ms": [0.1], "settled": False}
    report = prototype(*TEACHER)
    report.forms = [FormRow.model_validate(known | {"threads": threads}) for threads in (1, 2)]
    said = "students as members in int8 on 1 thread, students as members in int8 on 2 threads"
    assert sentences(report)[0] == f"Times had not settled when measuring began: {said}."
    assert not any("busy" in line for line in sentences(prototype(*TEACHER)))


def test_a_run_without_int8_has_nothing_to_compare() -> None:
    assert sentences(prototype(TEACHER[0])) == []
