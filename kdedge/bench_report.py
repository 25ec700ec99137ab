"""What bench.json holds, what it means in plain sentences, and the table that people see."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from kdedge.manifest import ValidationRow
from kdedge.recommendation import FormRow, Interval
from kdedge.statistics import FEWEST_ROUNDS, ratio_interval
from kdedge.validate import Validation

NOTES = [
    "latency is the time of InferenceSession.run at batch 1, on inputs prepared beforehand: test images, or for a head "
    "alone dense vectors drawn from a normal distribution",
    "speedup is the geometric mean over rounds of the fp32 teacher's p50 by the file's own p50 in the same process",
    "cold_start_ms is session creation and first run, the file being in the page cache",
    "peak_rss_bytes is what comes on top of empty_runner_rss_bytes",
]
BUSY = 0.95  # own_cpu_share below this: something else ran on the measuring core
PARTS = ("member", "head")  # roles of files that are no network by themselves
COMPARED = ("teacher", "merged")  # roles that speak for a network; recommendation.py compares the ways to run it


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
    sha256: str  # of the file, so that nobody takes this for a measurement of another one
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
    forms: list[FormRow] = []  # the ways to run each student
    empty_runner_rss_bytes: int
    seconds: float  # for which each file was to be timed in each round
    own_cpu_share: float  # of the wall time, the least of all rounds
    quick: bool
    verdicts: list[str]
    notes: list[str] = NOTES
    validation: Validation


def speedup(own_ms: list[float], other_ms: list[float]) -> tuple[float, Interval | None]:
    """How many times as fast as another file, from both p50s of each round, with the interval over rounds."""
    mean, interval = ratio_interval([other / own for own, other in zip(own_ms, other_ms, strict=True)])
    return round(mean, 4), interval and (round(interval[0], 4), round(interval[1], 4))


def sentences(report: BenchReport) -> list[str]:
    """What an engineer should know before choosing a file, the warnings first."""
    said = []
    if report.quick:
        said.append("This run was --quick: its accuracies mean nothing, and its latencies are few.")
    if report.own_cpu_share < BUSY:
        said.append(
            f"Something else kept the processor busy: the runner had {100 * report.own_cpu_share:.0f}% of its core. "
            "An idle machine is faster than these figures."
        )
    if any(len(row.round_p50_ms) == 1 for row in report.rows):
        said.append(
            "One round has no spread, so it cannot tell which file is faster. Write `bench: {rounds: 5}` into the "
            "recipe, distil it again, which trains nothing anew, and measure again."
        )
    restless = [_file(row) for row in report.rows if not row.settled]
    restless += [
        f"{one.network} as {one.form} in {one.precision} on {one.threads} {'threads' if one.threads > 1 else 'thread'}"
        for one in report.forms
        if not one.settled
    ]
    if restless:
        said.append(f"Times had not settled when measuring began: {', '.join(restless)}.")

    whole = {(row.network, row.role, row.precision): row for row in report.rows if row.role not in PARTS}
    compared = {key: row for key, row in whole.items() if row.role in COMPARED}
    accuracy = {(row.network, row.role, row.precision): row for row in report.validation.rows}
    for (network, role, precision), row in compared.items():
        fp32 = whole.get((network, role, "fp32"))
        if precision != "fp32" and fp32:
            said.append(_against_fp32(_name(report, row), row, fp32))
    for key, row in compared.items():
        teacher = next((r for r in compared.values() if r.role == "teacher" and _in_float(r) == _in_float(row)), None)
        if row.role != "teacher" and teacher:
            said.append(_against_teacher(_name(report, row), row, teacher, accuracy, key))
    if len({(row.network, row.role) for row in whole.values()}) > 1:
        said.append(_summary(report, list(whole.values()), accuracy))
    return said


def _in_float(row: BenchRow) -> bool:
    return row.precision == "fp32"


def _against_fp32(name: str, int8: BenchRow, fp32: BenchRow) -> str:
    times = f"({_ms(int8)} against {_ms(fp32)})"
    sizes = f"({_kb(int8)} against {_kb(fp32)})"
    faster = _faster(int8, fp32)
    if faster is None:
        told = f"{name}: {int8.precision} and fp32 {_undecided(int8)} {times}."
        return (
            told
            if len(int8.round_p50_ms) < FEWEST_ROUNDS
            else f"{told} {int8.precision} only changes the size {sizes}."
        )
    if faster:
        return f"{name}: {int8.precision} is {faster} as fast as fp32 {times}, in a file of {_kb(int8)} against {_kb(fp32)}."
    return f"{name}: {int8.precision} is slower than fp32 here {times}. Ship fp32, unless size matters {sizes}."


def _against_teacher(
    name: str,
    row: BenchRow,
    teacher: BenchRow,
    accuracy: dict[tuple[str, str, str], ValidationRow],
    key: tuple[str, str, str],
) -> str:
    teacher_key = (teacher.network, teacher.role, teacher.precision)
    points = accuracy[key].accuracy - accuracy[teacher_key].accuracy if {key, teacher_key} <= accuracy.keys() else None
    change = "" if points is None else f", with {abs(points):.2f} points {'less' if points < 0 else 'more'} accuracy"
    are, file = f"{name} ({row.precision}, {_ms(row)})", f"({teacher.precision}, {_ms(teacher)})"
    faster = _faster(row, teacher)
    if faster is None:
        return f"{are} and the teacher {file} {_undecided(row)}{change}."
    if faster:
        return f"{are}: {faster} as fast as the teacher {file}{change}."
    return (
        f"{are}: slower than the teacher {file}{change}. On this device the teacher's {teacher.precision} file is the "
        "simpler and faster choice."
    )


def _summary(report: BenchReport, whole: list[BenchRow], accuracy: dict[tuple[str, str, str], ValidationRow]) -> str:
    fastest, smallest = min(whole, key=lambda r: r.latency_ms_p50), min(whole, key=lambda r: r.file_bytes)
    said = []
    for word, row in (("Fastest", fastest), ("smallest", smallest)):
        found = accuracy.get((row.network, row.role, row.precision))
        figures = [_ms(row), *([f"{found.accuracy:.2f}%"] if found else []), _kb(row)]
        said.append(f"{word}: {_name(report, row)} in {row.precision} ({', '.join(figures)})")
    return "; ".join(said) + "."


def _faster(row: BenchRow, other: BenchRow) -> str | None:
    """How many times as fast as the other: "1.29 times"; "" when slower, None when that cannot be told apart."""
    ratio, interval = speedup(row.round_p50_ms, other.round_p50_ms)
    if interval is None or interval[0] <= 1 <= interval[1]:
        return None
    return f"{ratio:.2f} times" if ratio > 1 else ""


def _undecided(row: BenchRow) -> str:
    rounds = len(row.round_p50_ms)
    if rounds < FEWEST_ROUNDS:
        return f"cannot be told apart in speed by {'one round' if rounds == 1 else 'two rounds'}"
    return f"are not distinguishable in speed after {rounds} rounds"


def _name(report: BenchReport, row: BenchRow) -> str:
    """The network in words; one that has members is named as the graph that they are in."""
    group = any(other.role == "member" and other.network.startswith(f"{row.network}.") for other in report.rows)
    graph = " in one graph as trained" if row.role == "plain" else " in one graph" if group else ""
    return f"{row.network}{graph}"


def rows_for_print(report: BenchReport) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table, which fits 80 columns. Members become one line: the slowest, largest one.

    The accuracy beside a head is that of its members' files chained with it.
    """
    accuracy = {(row.network, row.role, row.precision): row for row in report.validation.rows}
    lines: dict[str, list[BenchRow]] = {}
    for row in report.rows:
        name = f"{row.network.rpartition('.')[0]} member {row.precision}" if row.role == "member" else _file(row)
        lines.setdefault(name, []).append(row)
    header = ["file", "accuracy %", "p50 ms", "p90", "p99", "speed", "kB", "RSS MB"]
    return header, [_line(name, rows, accuracy) for name, rows in lines.items()]


def _line(name: str, rows: list[BenchRow], accuracy: dict[tuple[str, str, str], ValidationRow]) -> list[str]:
    slowest = max(rows, key=lambda row: row.latency_ms_p50)
    found = accuracy.get((slowest.network, slowest.role, slowest.precision))
    half = (found.accuracy_ci95[1] - found.accuracy_ci95[0]) / 2 if found else 0
    p99 = slowest.latency_ms_p99
    return [
        name if len(rows) == 1 else f"{name} x{len(rows)}",
        f"{found.accuracy:.2f} ±{half:.2f}" if found else "",
        f"{slowest.latency_ms_p50:.3f}",
        f"{slowest.latency_ms_p90:.3f}",
        f"{p99:.3f}" if p99 is not None else "-",
        # A part alone does not do the teacher's work, so a speed-up beside it would mislead.
        f"{slowest.speedup:.2f}x" if slowest.speedup is not None and slowest.role not in PARTS else "-",
        f"{max(row.file_bytes for row in rows) / 1000:,.0f}",
        f"{max(row.peak_rss_bytes for row in rows) / 1e6:.1f}",
    ]


def _file(row: BenchRow) -> str:
    return f"{row.network} {row.role} {row.precision}"


def _ms(row: BenchRow) -> str:
    return f"{row.latency_ms_p50:.3f} ms"


def _kb(row: BenchRow) -> str:
    return f"{row.file_bytes / 1000:,.0f} kB"
