"""How a student is to be run on a device: in which precision, on how many threads, and of a group in which form: one graph,
rewritten or as trained, or its members' files. And whether int8 is worth it there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel

from kdedge.manifest import Precision, Recommended, Way
from kdedge.statistics import FEWEST_ROUNDS, ratio_interval

Interval = tuple[float, float]

AS_FAST = 1.05  # times the time of another one: two runs of the same file on a busy machine differ by as much


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


def recommend(rows: list[FormRow], device: dict[str, Any], ships: Mapping[str, Collection[str]]) -> list[Recommended]:
    """For each network the way to run it on a device: the fastest, or of those as fast the simplest and then the smallest.

    int8 counts where its files are among those that ship for the device's CPU class, as the manifest has them. There is none
    for networks with fewer rounds than tell equal speeds from unknown ones, which is three.
    """
    cpu_class, found = str(device.get("cpu_class", "unknown")), []
    for network in dict.fromkeys(row.network for row in rows):
        forms = [row for row in rows if row.network == network]
        if min(len(row.round_p50_ms) for row in forms) < FEWEST_ROUNDS:
            continue
        shipping = [row for row in forms if row.precision == "fp32" or set(row.files) <= {*ships.get(cpu_class, ())}]
        chosen, why = _best(shipping), ""
        if left_out := len(forms) - len(shipping):
            why = f" {left_out} more in int8 did not count: their files do not ship for {cpu_class}."
        found.append(
            Recommended(
                **chosen.model_dump(include={"network", "form", "precision", "threads", "files", "latency_ms_p50"}),
                cpu=device.get("cpu"),
                cpu_class=cpu_class,
                why=_why(network, shipping, chosen) + why,
            )
        )
    return found


def times_as_long(row: FormRow, other: FormRow) -> float:
    """How many times the time of another one it takes, in the geometric mean over rounds."""
    mean, _ = ratio_interval([own / theirs for own, theirs in zip(row.round_p50_ms, other.round_p50_ms, strict=True)])
    return mean


def _best(forms: list[FormRow]) -> FormRow:
    """The fastest, or of those that are as fast the one with the fewest threads, files and bytes."""
    fastest = min(forms, key=lambda row: row.latency_ms_p50)
    return min(
        (row for row in forms if row is fastest or times_as_long(row, fastest) <= AS_FAST),
        key=lambda row: (row.threads, len(row.files), row.file_bytes),
    )


def _slower(row: FormRow, other: FormRow) -> bool:
    """Whether it takes longer than another one, for certain."""
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
    fp32, int8 = (chosen if chosen in by_float[one] else _best(by_float[one]) for one in (True, False))
    times = f"({int8.latency_ms_p50:.3f} against {fp32.latency_ms_p50:.3f} ms"
    sizes = f"{int8.file_bytes / 1000:,.0f} against {fp32.file_bytes / 1000:,.0f} kB)"
    if chosen is not int8 or times_as_long(fp32, int8) <= AS_FAST:
        return f"{said} int8 is not worth it here but for its size {times}, {sizes}."
    if _slower(fp32, int8):
        return f"{said} int8 is worth it here {times}, {sizes}."
    return f"{said} int8 may be worth it here {times}, {sizes}: its times vary too much to tell."
