"""In which form a group of students is fastest on a device: one graph, rewritten or as trained, or its members' files, in which
precision, on how many threads. And whether int8 is worth it there.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from kdedge.manifest import Precision, Recommended, Way
from kdedge.statistics import FEWEST_ROUNDS, ratio_interval

Interval = tuple[float, float]


class FormRow(BaseModel):
    """One way to run a network on the device, at batch 1."""

    network: str
    form: Way  # of members, the threads share the members
    precision: Precision
    threads: int
    n: int  # counted runs, over all rounds
    latency_ms_p50: float
    latency_ms_p50_ci95: Interval | None
    round_p50_ms: list[float]
    files: list[str]
    file_bytes: int  # of all of them
    settled: bool


def recommend(rows: list[FormRow], device: dict[str, Any]) -> list[Recommended]:
    """For each network the form to run on a device: the fastest, or of those as fast the simplest and then the smallest.

    None of networks with fewer rounds than tell equal speeds from unknown ones, which is three.
    """
    found = []
    for network in dict.fromkeys(row.network for row in rows):
        forms = [row for row in rows if row.network == network]
        if min(len(row.round_p50_ms) for row in forms) < FEWEST_ROUNDS:
            continue
        chosen = _best(forms)
        found.append(
            Recommended(
                **chosen.model_dump(include={"network", "form", "precision", "threads", "files", "latency_ms_p50"}),
                cpu=device.get("cpu"),
                cpu_class=str(device.get("cpu_class", "unknown")),
                why=_why(network, forms, chosen),
            )
        )
    return found


def _best(forms: list[FormRow]) -> FormRow:
    """The fastest; of those that are not slower for certain the one with the fewest threads, files and bytes."""
    fastest = min(forms, key=lambda row: row.latency_ms_p50)
    as_fast = [row for row in forms if row is fastest or not _slower(row, fastest)]
    return min(as_fast, key=lambda row: (row.threads, len(row.files), row.file_bytes))


def _slower(row: FormRow, other: FormRow) -> bool:
    ratios = [theirs / own for own, theirs in zip(row.round_p50_ms, other.round_p50_ms, strict=True)]
    _, interval = ratio_interval(ratios)
    return interval is not None and interval[1] < 1


def _why(network: str, forms: list[FormRow], chosen: FormRow) -> str:
    """A sentence on the choice, and one on int8."""
    threads = "1 thread" if chosen.threads == 1 else f"{chosen.threads} threads"
    said = (
        f"{network}: run {chosen.form} in {chosen.precision} on {threads} here, {chosen.latency_ms_p50:.3f} ms; "
        f"the slowest of {len(forms)} ways takes {max(row.latency_ms_p50 for row in forms):.3f} ms."
    )
    by_float = {is_float: [row for row in forms if (row.precision == "fp32") == is_float] for is_float in (True, False)}
    if not all(by_float.values()):
        return said
    fp32, int8 = _best(by_float[True]), _best(by_float[False])
    times = f"({int8.latency_ms_p50:.3f} against {fp32.latency_ms_p50:.3f} ms"
    sizes = f"{int8.file_bytes / 1000:,.0f} against {fp32.file_bytes / 1000:,.0f} kB)"
    if _slower(fp32, int8):
        return f"{said} int8 is worth it here {times}, {sizes}."
    return f"{said} int8 is not worth it here but for its size {times}, {sizes}."
