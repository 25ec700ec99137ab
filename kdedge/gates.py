"""The gates of `export`: may int8 stand in for float32, on every CPU class that the files are for?

What may not is written in another form and judged again. What could not be run on a class has not passed on it. Where classes
need different forms, one that does for all of them is preferred.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from kdedge.benchmark import IMAGES, MIN_RUNS, forms
from kdedge.devices import emulated
from kdedge.errors import DeviceError, GateError
from kdedge.manifest import FORMS, INT8, ExportedFile, GateResult, Manifest, Place, Precision, check_file
from kdedge.progress import Quiet
from kdedge.recipe import Bench, Deploy
from kdedge.recommendation import AS_FAST, FormRow, times_as_long
from kdedge.statistics import FEWEST_ROUNDS, paired_drop
from kdedge.store import write_json
from kdedge.validate import Known, Validation, graph_files, graphs, job_path, measure, put_array

EMULATED_IMAGES = 2000  # a few minutes a class

Write = Callable[[Precision, Collection[Place]], Iterable[ExportedFile]]
Mend = Callable[["Court", Place], None]


@dataclass(frozen=True)
class Court:
    """An export folder, and what its int8 files are judged by."""

    export: Path
    manifest: Manifest
    images: NDArray[np.uint8]
    labels: NDArray[np.integer[Any]]
    deploy: Deploy
    bench: Bench
    known: Known
    progress: Quiet

    @cached_property
    def native(self) -> Validation:
        """What fp32 and int8 say on this machine."""
        return self.said_on("cpu", "fp32", "int8")

    @property
    def here(self) -> str:
        return str(self.native.device.get("cpu_class", "unknown"))

    def device(self, cpu_class: str) -> str:
        """Where a CPU class is run: here, or emulated."""
        return "cpu" if cpu_class == self.here else cpu_class

    def said_on(self, device: str, *precisions: Precision) -> Validation:
        """What files say of the images, or of the first of them where they are emulated. Raises DeviceError."""
        n = len(self.labels) if device == "cpu" else min(EMULATED_IMAGES, len(self.labels))
        if device != "cpu":
            self.progress.note(
                f"{device}: {', '.join(precisions)} on {n:,} validation images, emulated, which takes minutes"
            )
        write_json(self.export / "manifest.json", self.manifest.model_dump(mode="json"))  # `measure` runs what is in it
        given = self.images[:n], self.labels[:n]
        return measure(self.export, *given, split="validation", device=device, precisions=precisions, known=self.known)

    def verdicts(self, cpu_class: str, judged: Collection[Place], form: Precision) -> list[GateResult]:
        """The verdict on each of some places in a form, on a CPU class. Raises DeviceError when it cannot be run here."""
        there = self.said_on(self.device(cpu_class), form)
        return [gate(self.native, there, place, form, self.deploy.int8.max_drop_points) for place in judged]

    def times(self, place: Place, *precisions: Precision) -> list[FormRow]:
        """What the files of a place take on this machine in each of `precisions`, in turns, at batch 1."""
        own = {one.precision: one for one in graphs(self.manifest) if (one.network, one.role) == place}
        ways = [(own[precision], self.bench.threads) for precision in precisions]
        files = {job_path(file): check_file(self.export, file) for one, _ in ways for file in graph_files(one)}
        with tempfile.TemporaryDirectory(prefix="kdedge-times-") as folder:
            images = put_array(Path(folder) / "images.npy", self.images[:IMAGES], files)
            job = {"task": "latency", "images": images, "seconds": self.bench.seconds, "min_runs": MIN_RUNS}
            return forms("cpu", job, ways, files, self.bench.rounds, self.progress.note)


def judge(
    export: Path,
    manifest: Manifest,
    images: NDArray[np.uint8],
    labels: NDArray[np.integer[Any]],
    deploy: Deploy,
    bench: Bench,
    write: Write,
    *,
    repair: Mend | None = None,
    known: Known | None = None,
    progress: Quiet | None = None,
) -> None:
    """Judge the int8 files of an export folder on the CPU classes of `deploy`, or on this machine's when it names none.

    Images are uint8 [n, C, H, W], labels integer [n]; an emulated class sees the first 2,000 of them. `write` makes the files
    of some networks in another form of int8, if they can have it; `repair` may add others for one that passed in none. `bench`
    says how forms are timed. The manifest gets the verdicts, what ships on which class, and all accuracies here; the forms of a
    network that ship nowhere are deleted, unless none does. Raises GateError when there is nothing to judge, DeviceError when
    this machine fails.
    """
    known = Known() if known is None else known
    court = Court(export, manifest, images, labels, deploy, bench, known, progress or Quiet())
    if not places(manifest, "int8"):
        raise GateError("The gate has nothing to judge: there is no int8 file. Export again.")
    limit = deploy.int8.max_drop_points
    for cpu_class in deploy.cpu_classes or (court.here,):
        left = places(manifest, "int8")
        try:
            if cpu_class != court.here and (problem := emulated.problem(cpu_class)):
                raise DeviceError(problem)
            for form in FORMS:
                if missing := [place for place in left if place not in places(manifest, form)]:
                    manifest.files += write(form, missing)
                if judged := [place for place in left if place in places(manifest, form)]:
                    manifest.gates += (results := court.verdicts(cpu_class, judged, form))
                    passed = [one.place for one in results if one.passed]
                    if form != FORMS[0]:
                        names = ", ".join(map(name_of, passed)) or "nothing"
                        court.progress.note(f"{cpu_class}: {form} passes for {names}")
                    left = [place for place in left if place not in passed]
                    if not left or least_drop(results[0].n) > limit:
                        break
        except DeviceError as error:
            if cpu_class == court.here:
                raise
            manifest.gates += [_not_judged(place, cpu_class, limit, f"not validated: {error}") for place in left]
        for place in left:
            if place[1] == "plain":
                court.progress.note(f"{cpu_class}: {name_of(place)} has not passed in int8 and does not ship there")
    if repair is not None:
        for place in dict.fromkeys(verdict.place for verdict in manifest.refused):
            repair(court, place)
    _keep_what_ships(export, manifest, _chosen(court))
    manifest.accuracy = court.said_on("cpu", *get_args(Precision)).rows


def places(manifest: Manifest, precision: Precision) -> list[Place]:
    """What the export has in a precision."""
    return [(graph.network, graph.role) for graph in graphs(manifest) if graph.precision == precision]


def gate(fp32: Validation, int8: Validation, place: Place, form: Precision, max_drop_points: float) -> GateResult:
    """May a network in a form of int8 stand in for fp32? `int8` was measured on all images of `fp32`, or the first of them.

    It may when the upper end of the 95% interval of the paired drop is at most `max_drop_points` percentage points.
    Whatever was not measured in both fails.
    """
    cpu_class = str(int8.device.get("cpu_class", "unknown"))
    reference, candidate = fp32.right(*place, "fp32"), int8.right(*place, form)
    missing = [name for name, right in (("fp32", reference), (form, candidate)) if not right.size]
    if missing or len(candidate) > len(reference):
        why = f"not measured in {' and '.join(missing) or 'both on the same images'}"
        return _not_judged(place, cpu_class, max_drop_points, why, form)
    drop = paired_drop(reference[: len(candidate)], candidate)
    reason = (
        f"{name_of(place)}: {form} drops by {drop.points:.2f} points on {drop.n} images on {cpu_class}, with an upper 95% "
        f"bound of {drop.upper_points:.2f}; {max_drop_points:g} are allowed"
    )
    if least_drop(drop.n) > max_drop_points:
        reason += f"; {drop.n} images cannot show less than {least_drop(drop.n):.2f}, keep more for validation"
    return GateResult(
        network=place[0],
        role=place[1],
        precision=form,
        cpu_class=cpu_class,
        drop_points=round(drop.points, 4),
        upper95_points=round(drop.upper_points, 4),
        max_drop_points=max_drop_points,
        passed=drop.upper_points <= max_drop_points,  # false for nan
        only_fp32=drop.only_reference,
        only_int8=drop.only_candidate,
        n=drop.n,
        reason=reason,
    )


def _not_judged(place: Place, cpu_class: str, max_drop_points: float, why: str, form: Precision = "int8") -> GateResult:
    return GateResult(
        network=place[0],
        role=place[1],
        precision=form,
        cpu_class=cpu_class,
        drop_points=None,
        upper95_points=None,
        max_drop_points=max_drop_points,
        passed=False,
        only_fp32=0,
        only_int8=0,
        n=0,
        reason=f"{name_of(place)} on {cpu_class}: {why}",
    )


def name_of(place: Place) -> str:
    """What messages call it."""
    network, role = place
    return f"{network} ({role})"


def least_drop(n: int) -> float:
    """What n images show at best, in points: the bound when int8 says of all what fp32 says."""
    return paired_drop(right := np.ones(n, np.bool_), right).upper_points


def _chosen(court: Court) -> dict[Place, dict[str, Precision]]:
    """For each place the form that ships on each CPU class where one passed: the first that did, or one for all of them."""
    passed: dict[Place, dict[str, Precision]] = {}
    for verdict in court.manifest.gates:
        if verdict.passed:
            passed.setdefault(verdict.place, {}).setdefault(str(verdict.cpu_class), verdict.precision)
    for place, forms_by_class in passed.items():
        last = max(forms_by_class.values(), key=INT8.index)  # no other one passes where it was needed
        others = {cpu_class: form for cpu_class, form in forms_by_class.items() if form != last}
        if not others:
            continue
        if objection := _objection(court, place, last, others):
            court.progress.note(f"{name_of(place)}: {last} does not ship alone, as {objection}")
        else:
            passed[place] = dict.fromkeys(forms_by_class, last)
            court.progress.note(f"{name_of(place)}: {last} does for {', '.join(forms_by_class)}, so it ships alone")
    return passed


def _objection(court: Court, place: Place, form: Precision, others: dict[str, Precision]) -> str | None:
    """What speaks against a form on the CPU classes of `others`, which have another one: it fails there, is less accurate as far
    as can be told, or is slower here. Raises DeviceError when this machine fails."""
    for cpu_class in sorted(others, key=lambda name: name != court.here):  # here it takes seconds, elsewhere minutes
        other = others[cpu_class]
        try:
            there = court.said_on(court.device(cpu_class), other, form)
        except DeviceError as error:
            if cpu_class == court.here:
                raise
            return str(error)
        court.manifest.gates.append(
            verdict := gate(court.native, there, place, form, court.deploy.int8.max_drop_points)
        )
        if not verdict.passed:
            return f"it does not pass on {cpu_class}"
        drop = paired_drop(there.right(*place, other), there.right(*place, form))
        if drop.lower_points > 0:
            return f"it loses {drop.points:.2f} points against {other} on {cpu_class}"
        if cpu_class == court.here and (slow := _slower_here(court.times(place, form, other))):
            return slow
    return None


def _slower_here(rows: list[FormRow]) -> str | None:
    """What speaks against the first of two ways, as far as it was timed."""
    row, other = rows
    if len(row.round_p50_ms) < FEWEST_ROUNDS:
        return f"{len(row.round_p50_ms)} rounds do not tell how fast it is here"
    if (ratio := times_as_long(row, other)) > AS_FAST:
        return f"it takes {ratio:.2f} times as long as {other.precision} here"
    return None


def lost(verdict: GateResult) -> bool:
    """Whether a network that is refused lost too much, rather than that it cannot be told, for want of the CPU or of images."""
    if verdict.drop_points is None:
        return False
    return verdict.drop_points > verdict.max_drop_points or least_drop(verdict.n) <= verdict.max_drop_points


def _keep_what_ships(export: Path, manifest: Manifest, chosen: dict[Place, dict[str, Precision]]) -> None:
    """Map classes to files, and delete the forms of each network that ship nowhere, but the first one of what must ship."""
    manifest.ships = {}
    for graph in graphs(manifest):
        place, paths = (graph.network, graph.role), [file.path for file in graph_files(graph)]
        classes = [cpu_class for cpu_class, form in chosen.get(place, {}).items() if form == graph.precision]
        for cpu_class in classes:
            manifest.ships.setdefault(cpu_class, []).extend(paths)
        if graph.precision == "fp32" or classes:
            continue
        if place in chosen or graph.precision != "int8" or graph.role == "plain":
            manifest.files = [file for file in manifest.files if file.path not in paths]
            for path in paths:
                (export / path).unlink()
