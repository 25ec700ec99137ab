"""The story of `bench`: accuracy, latency, cold start and memory of the exported files, on the device they are for.

Everything is measured by the runner in fresh processes. Latency: several rounds, each one process that holds all files
and lets them take turns, so that ratios are taken within a round. Cold start and memory: one process a file.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdedge import devices
from kdedge.bench_report import BenchReport, BenchRow, rows_for_print, sentences, speedup
from kdedge.data.load import load_recorded
from kdedge.devices import ColdAnswer, LatencyAnswer
from kdedge.errors import DeviceError
from kdedge.manifest import ExportedFile, Manifest, Recommended, Way, check_file, manifest_of
from kdedge.recipe_reader import resolved_recipe
from kdedge.recommendation import FormRow, recommend
from kdedge.statistics import quantile, quantile_interval
from kdedge.store import Run, lock, open_run, write_json
from kdedge.validate import (
    Graph,
    Known,
    graph_files,
    graphs,
    job_file,
    job_graph,
    job_path,
    measure,
    put_array,
    save_predictions,
)
from kdedge.variants import QUICK_IMAGES

__all__ = ["BenchReport", "bench", "rows_for_print"]

IMAGES = 64  # in turn: one and the same would flatter branch predictor and caches
MIN_RUNS = 100  # of a file in a round, however slow it is
COLD_STARTS = 3  # the median counts
WAYS: dict[str, Way] = {"head": "members", "plain": "one graph as trained"}  # by role


def bench(
    run: Run | Path | str,
    *,
    device: str = "cpu",
    threads: int | None = None,
    data_dir: Path | None = None,
    progress: Callable[[str], None] = lambda line: None,
    known: Known | None = None,
) -> BenchReport:
    """Measure the run's export on `device`; write validation.json, predictions.npz and bench.json into the run, and into the
    manifest how to run a student there.

    `threads` wins over the recipe's; `progress` gets a line before each step. Calls that are given the same `known`, empty at
    first, measure the accuracy of a file that their runs share once. Raises RunError, DataError, DeviceError.
    """
    devices.find(device)
    run = run if isinstance(run, Run) else open_run(Path(run))
    settings = resolved_recipe(run.recipe, str(run.path / "run.json")).bench
    threads, rounds = threads or settings.threads, settings.rounds
    with lock(run.path), tempfile.TemporaryDirectory(prefix="kdedge-bench-") as folder:
        export = run.path / "export"
        files, data = (manifest := manifest_of(run)).files, load_recorded(run.data, data_dir)
        n = QUICK_IMAGES if run.quick else len(data.test_labels)
        images, labels = data.test_images[:n], data.test_labels[:n]
        progress(f"accuracy on {len(labels):,} test images")
        validation = measure(export, images, labels, split="test", device=device, known=known)
        save_predictions(run.path / "predictions.npz", validation, labels)
        write_json(run.path / "validation.json", validation.model_dump(mode="json"))

        sent = {job_path(file): check_file(export, file) for file in files}
        few = put_array(Path(folder) / "images.npy", data.test_images[:IMAGES], sent)
        job: dict[str, Any] = {"threads": threads, "images": few}
        turns = job | {"task": "latency", "seconds": settings.seconds, "min_runs": MIN_RUNS}
        job_files = [{"name": f"{file.network} {file.role} {file.precision}", **job_file(file)} for file in files]
        alone = [{"name": file["name"], "members": [file], "head": None, "threads": threads} for file in job_files]
        timed = _rounds(device, turns | {"graphs": alone}, sent, rounds, f"{len(files)} files", progress)
        own = timed[0].device
        ways = [] if run.quick else _ways(manifest, int(own.get("affinity") or own.get("cores") or 1))
        forms_timed = forms(device, turns, ways, sent, rounds, progress)

        repeats = 1 if run.quick else min(COLD_STARTS, rounds)
        progress(f"cold start and memory of {len(files)} files, runs of each: {repeats}")
        empty = _cold(device, job, [], sent, repeats)
        cold = [_cold(device, job, [file], sent, repeats) for file in job_files]
        report = BenchReport(
            device=timed[0].device,
            rows=_rows(files, threads, timed, cold, _median_rss(empty)),
            forms=forms_timed,
            empty_runner_rss_bytes=_median_rss(empty),
            seconds=settings.seconds,
            own_cpu_share=round(min(answer.own_cpu_share for answer in timed), 4),
            quick=run.quick,
            verdicts=[],
            validation=validation,
        )
        recommended = recommend(report.forms, report.device, manifest.ships)
        report.verdicts = [*sentences(report), *(one.why for one in recommended)]
        write_json(run.path / "bench.json", report.model_dump(mode="json", exclude={"validation"}))
        _record(export, manifest, recommended)
    return report


def _rounds(
    device: str,
    job: dict[str, Any],
    sent: dict[str, Path],
    rounds: int,
    what: str,
    progress: Callable[[str], None],
) -> list[LatencyAnswer]:
    """What the graphs of a latency job took in each round; no round of no graphs."""
    timed: list[LatencyAnswer] = []
    for i in range(rounds if job["graphs"] else 0):
        progress(f"latency of {what}, round {i + 1} of {rounds}")
        timed.append(answer := devices.ask(device, job, sent, LatencyAnswer))
        if [graph.name for graph in answer.graphs] != [graph["name"] for graph in job["graphs"]]:
            raise DeviceError(f"{device}: the runner answered for other files than it was asked for")
    return timed


def _ways(manifest: Manifest, cores: int) -> list[tuple[Graph, int]]:
    """Every way to run what is not a teacher, and on how many threads."""
    students = [graph for graph in graphs(manifest) if graph.role != "teacher"]
    return [(graph, threads) for graph in students for threads in sorted({1, cores})]


def forms(
    device: str,
    job: dict[str, Any],
    ways: list[tuple[Graph, int]],
    sent: dict[str, Path],
    rounds: int,
    progress: Callable[[str], None],
) -> list[FormRow]:
    """What ways to run graphs, each on so many threads, take in turns; `job` is one for latency, without its graphs."""
    asked = [job_graph(graph) | {"name": f"{graph.name} {threads}", "threads": threads} for graph, threads in ways]
    timed = _rounds(device, job | {"graphs": asked}, sent, rounds, f"{len(ways)} graphs", progress)
    rows = []
    for i, (graph, threads) in enumerate(ways):
        runs_ms = sorted(ns / 1e6 for answer in timed for ns in answer.graphs[i].latencies_ns)
        files = graph_files(graph)
        rows.append(
            FormRow(
                network=graph.network,
                form=WAYS.get(graph.role, "one graph"),
                precision=graph.precision,
                threads=threads,
                n=len(runs_ms),
                latency_ms_p50=quantile(runs_ms, 0.5),
                latency_ms_p50_ci95=quantile_interval(runs_ms, 0.5),
                round_p50_ms=[_p50_ms(answer.graphs[i].latencies_ns) for answer in timed],
                files=[file.path for file in files],
                file_bytes=sum(file.bytes for file in files),
                settled=all(answer.graphs[i].settled for answer in timed),
            )
        )
    return rows


def _record(export: Path, manifest: Manifest, recommended: list[Recommended]) -> None:
    """Write what was recommended into the manifest, in the place of what was for the same CPU."""
    if recommended:
        here = recommended[0].cpu, recommended[0].cpu_class
        manifest.recommended = [one for one in manifest.recommended if (one.cpu, one.cpu_class) != here] + recommended
        write_json(export / "manifest.json", manifest.model_dump(mode="json"))


def _cold(
    device: str, job: dict[str, Any], files: list[dict[str, str]], sent: dict[str, Path], repeats: int
) -> list[ColdAnswer]:
    """Cold start and memory of one file, or with no file of the empty runner, each time in a fresh process."""
    used = {path: sent[path] for path in [job["images"]["path"], *(file["path"] for file in files)]}
    job = job | {"task": "cold", "files": files}
    answers = [devices.ask(device, job, used, ColdAnswer) for _ in range(repeats)]
    if any((answer.cold_start_ms is None) != (not files) for answer in answers):
        raise DeviceError(f"{device}: the runner answered for other files than it was asked for")
    return answers


def _rows(
    files: list[ExportedFile],
    threads: int,
    timed: list[LatencyAnswer],
    cold: list[list[ColdAnswer]],
    empty_rss_bytes: int,
) -> list[BenchRow]:
    round_p50_ms = [[_p50_ms(answer.graphs[i].latencies_ns) for answer in timed] for i in range(len(files))]
    teacher = next((i for i, file in enumerate(files) if (file.role, file.precision) == ("teacher", "fp32")), None)
    rows = []
    for i, file in enumerate(files):
        runs_ms = sorted(ns / 1e6 for answer in timed for ns in answer.graphs[i].latencies_ns)
        p99_ci95 = quantile_interval(runs_ms, 0.99)
        ratio, ratio_ci95 = speedup(round_p50_ms[i], round_p50_ms[teacher]) if teacher is not None else (None, None)
        rows.append(
            BenchRow(
                network=file.network,
                role=file.role,
                precision=file.precision,
                sha256=file.sha256,
                threads=threads,
                n=len(runs_ms),
                latency_ms_p50=quantile(runs_ms, 0.5),
                latency_ms_p90=quantile(runs_ms, 0.9),
                latency_ms_p99=quantile(runs_ms, 0.99) if p99_ci95 else None,
                cold_start_ms=round(statistics.median(answer.cold_start_ms or 0 for answer in cold[i]), 3),
                peak_rss_bytes=max(0, _median_rss(cold[i]) - empty_rss_bytes),
                file_bytes=file.bytes,
                latency_ms_p50_ci95=quantile_interval(runs_ms, 0.5),
                latency_ms_p90_ci95=quantile_interval(runs_ms, 0.9),
                latency_ms_p99_ci95=p99_ci95,
                speedup=ratio,
                speedup_ci95=ratio_ci95,
                round_p50_ms=round_p50_ms[i],
                settled=all(answer.graphs[i].settled for answer in timed),
            )
        )
    return rows


def _p50_ms(latencies_ns: list[int]) -> float:
    return quantile(sorted(latencies_ns), 0.5) / 1e6


def _median_rss(answers: list[ColdAnswer]) -> int:
    return int(statistics.median(answer.peak_rss_bytes for answer in answers))
