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

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from kdedge import devices, verdicts
from kdedge.data.load import load
from kdedge.devices import ColdAnswer, LatencyAnswer
from kdedge.errors import DeviceError, RunError
from kdedge.statistics import quantile, quantile_interval, ratio_interval
from kdedge.store import ExportedFile, Run, check_file, lock, open_run, read_manifest, write_json
from kdedge.validate import Validation, job_file, job_path, measure, put_array

IMAGES = 256  # of the test split; the runner rotates over the first 64
MIN_RUNS = 100  # of a file in a round, however slow it is
COLD_STARTS = 3  # the median counts
NOTES = [
    "latency is the time of InferenceSession.run at batch 1, on inputs prepared beforehand: test images, or for a head "
    "alone dense vectors drawn from a normal distribution",
    "speedup is the geometric mean over rounds of the fp32 teacher's p50 by the file's own p50 in the same process",
    "cold_start_ms is session creation and first run, the file being in the page cache",
    "peak_rss_bytes is what comes on top of empty_runner_rss_bytes",
]

Interval = tuple[float, float]


class BenchRow(BaseModel):
    """One exported file on the device. Intervals are 95%; null when n is too small for them."""

    network: str
    role: str
    precision: str
    threads: int
    batch: int = 1
    n: int  # counted runs, over all rounds
    latency_ms_p50: float
    latency_ms_p90: float
    latency_ms_p99: float | None
    cold_start_ms: float
    peak_rss_bytes: int  # over the empty runner's
    file_bytes: int
    latency_ms_p50_ci95: Interval | None
    latency_ms_p90_ci95: Interval | None
    latency_ms_p99_ci95: Interval | None
    speedup: float | None  # over the fp32 teacher; null when there is none
    speedup_ci95: Interval | None
    round_p50_ms: list[float]
    settled: bool  # whether every warm-up ended because the times had settled


class BenchReport(BaseModel):
    """What `bench` measured; bench.json is this without `validation`, which has a file of its own."""

    device: dict[str, Any]
    rows: list[BenchRow]
    empty_runner_rss_bytes: int
    own_cpu_share: float  # of the wall time, the least of all rounds: below 1 when something else held the core
    quick: bool
    verdicts: list[str]
    notes: list[str] = NOTES
    validation: Validation


def bench(
    run: Run | Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    data_dir: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> BenchReport:
    """Measure the run's export on `device` and write validation.json and bench.json into the run.

    `threads` wins over the recipe's. `progress` gets a line before each step. Raises RunError, DataError or DeviceError.
    """
    devices.find(device)
    run = run if isinstance(run, Run) else open_run(run)
    say = progress or (lambda line: None)
    settings = {"threads": 1, "rounds": 5, "seconds": 1.0} | run.recipe.get("bench", {})
    threads, rounds = threads or int(settings["threads"]), int(settings["rounds"])
    with lock(run.path), tempfile.TemporaryDirectory(prefix="kdedge-bench-") as folder:
        manifest = read_manifest(run.path)
        images, labels = _test_split(run, data_dir)

        say(f"accuracy on {len(images):,} test images")
        validation = measure(run.path, images, labels, split="test", device=device)
        write_json(run.path / "validation.json", validation.model_dump(mode="json"))

        job: dict[str, Any] = {"threads": threads}
        sent: dict[str, Path] = {}
        job["images"] = put_array(Path(folder) / "images.npy", images[:IMAGES], sent)
        timed = []
        for i in range(rounds):
            say(f"latency of {len(manifest.files)} files, round {i + 1} of {rounds}")
            timed.append(_latency(device, job, float(settings["seconds"]), run.path / "export", manifest.files, sent))

        repeats = min(COLD_STARTS, rounds)
        say(f"cold start and memory of {len(manifest.files)} files, {repeats} times each")
        empty = [_cold(device, job, run.path / "export", None, sent) for _ in range(repeats)]
        cold = [[_cold(device, job, run.path / "export", file, sent) for _ in range(repeats)] for file in manifest.files]

        report = BenchReport(
            device=timed[0].device,
            rows=_rows(manifest.files, threads, timed, cold, empty),
            empty_runner_rss_bytes=_median_rss(empty),
            own_cpu_share=round(min(answer.own_cpu_share for answer in timed), 4),
            quick=run.quick,
            verdicts=[],
            validation=validation,
        )
        report.verdicts = verdicts.sentences(report)
        write_json(run.path / "bench.json", report.model_dump(mode="json", exclude={"validation"}))
    return report


def _test_split(run: Run, data_dir: Path | None) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Test images uint8 [n, C, H, W] and labels of the very data that the run was distilled on."""
    data = load(str(run.data.get("name")), data_dir)
    if data.fingerprint != run.data.get("fingerprint"):
        raise RunError(
            f"{run.path} was distilled on {data.name} with fingerprint {run.data.get('fingerprint')}, but {data.origin} "
            f"has {data.fingerprint}. Name the folder of the same data with --data-dir."
        )
    return data.test_images, data.test_labels


def _latency(
    device: str, job: dict[str, Any], seconds: float, export: Path, exported: list[ExportedFile], sent: dict[str, Path]
) -> LatencyAnswer:
    """One round: all files in one fresh process."""
    files = sent | {job_path(file): check_file(export, file) for file in exported}
    named = [{"name": _name(file), **job_file(file)} for file in exported]
    job = job | {"task": "latency", "seconds": seconds, "min_runs": MIN_RUNS, "files": named}
    answer = devices.ask(device, job, files, LatencyAnswer)
    if [file.name for file in answer.files] != [_name(file) for file in exported]:
        raise DeviceError(f"{device}: the runner answered for other files than it was asked for")
    return answer


def _cold(
    device: str, job: dict[str, Any], export: Path, file: ExportedFile | None, sent: dict[str, Path]
) -> ColdAnswer:
    """Cold start and memory of one file in a fresh process, or of the empty runner."""
    files = sent | ({job_path(file): check_file(export, file)} if file else {})
    named = [{"name": _name(file), **job_file(file)}] if file else []
    answer = devices.ask(device, job | {"task": "cold", "files": named}, files, ColdAnswer)
    if (answer.cold_start_ms is None) != (file is None):
        raise DeviceError(f"{device}: the runner answered for other files than it was asked for")
    return answer


def _rows(
    files: list[ExportedFile],
    threads: int,
    timed: list[LatencyAnswer],
    cold: list[list[ColdAnswer]],
    empty: list[ColdAnswer],
) -> list[BenchRow]:
    round_p50_ms = [[_p50_ms(answer.files[i].latencies_ns) for answer in timed] for i in range(len(files))]
    teacher = next((i for i, file in enumerate(files) if (file.role, file.precision) == ("teacher", "fp32")), None)
    rows = []
    for i, file in enumerate(files):
        runs_ms = sorted(ns / 1e6 for answer in timed for ns in answer.files[i].latencies_ns)
        p99_ci95 = quantile_interval(runs_ms, 0.99)
        speedup, speedup_ci95 = None, None
        if teacher is not None:
            speedup, speedup_ci95 = speedup_of(round_p50_ms[i], round_p50_ms[teacher])
        rows.append(
            BenchRow(
                network=file.network,
                role=file.role,
                precision=file.precision,
                threads=threads,
                n=len(runs_ms),
                latency_ms_p50=quantile(runs_ms, 0.5),
                latency_ms_p90=quantile(runs_ms, 0.9),
                latency_ms_p99=quantile(runs_ms, 0.99) if p99_ci95 else None,
                cold_start_ms=round(statistics.median(answer.cold_start_ms or 0 for answer in cold[i]), 3),
                peak_rss_bytes=max(0, _median_rss(cold[i]) - _median_rss(empty)),
                file_bytes=file.bytes,
                latency_ms_p50_ci95=quantile_interval(runs_ms, 0.5),
                latency_ms_p90_ci95=quantile_interval(runs_ms, 0.9),
                latency_ms_p99_ci95=p99_ci95,
                speedup=speedup,
                speedup_ci95=speedup_ci95,
                round_p50_ms=round_p50_ms[i],
                settled=all(answer.files[i].settled for answer in timed),
            )
        )
    return rows


def speedup_of(own_ms: list[float], other_ms: list[float]) -> tuple[float, Interval | None]:
    """How many times as fast as another file, from both p50s of each round, with its interval over rounds."""
    mean, interval = ratio_interval([other / own for own, other in zip(own_ms, other_ms, strict=True)])
    return round(mean, 4), interval and (round(interval[0], 4), round(interval[1], 4))


def _p50_ms(latencies_ns: list[int]) -> float:
    return quantile(sorted(latencies_ns), 0.5) / 1e6


def _median_rss(answers: list[ColdAnswer]) -> int:
    return int(statistics.median(answer.peak_rss_bytes for answer in answers))


def _name(file: ExportedFile) -> str:
    return f"{file.network} {file.role} {file.precision}"
