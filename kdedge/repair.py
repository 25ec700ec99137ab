"""The story of `export --repair`: int8 that passed its gate in no form, changed until it does.

First what costs nothing when it runs: ranges that another method finds. Then layers in float, those first that put the most
noise on the output when they are alone in int8. All that is found on the calibration images; every candidate is then judged
on the validation images, on each CPU class where the network failed, by the same gate as any file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar, get_args

import numpy as np
import onnx
from numpy.typing import NDArray
from torch import Tensor

from exporters.calibration import Calibration, activations
from exporters.int8 import FORMS, quantize
from exporters.signals import Layer, Signal, apart, layers
from kdedge.data.catalog import DatasetInfo
from kdedge.gates import Court, least_drop, name_of
from kdedge.manifest import ExportedFile, GateResult, Manifest, Place, Precision, Repair, Repaired
from kdedge.pieces import Piece
from kdedge.statistics import ratio_interval

REPAIRED: Precision = "int8-repaired"

_T = TypeVar("_T")


class Write(Protocol):
    """Write a piece in a precision, and as its repair says."""

    def __call__(self, piece: Piece, precision: Precision, repair: Repair) -> ExportedFile: ...


class Noisy(NamedTuple):
    """A layer of a piece, and the signal-to-quantization-noise ratio of the piece's output with this layer alone in int8."""

    piece: Piece
    layer: Layer
    sqnr_db: float

    def label(self, *, of_several: bool) -> str:
        """What messages call it."""
        name = f"{self.layer.name.removeprefix('node_')} ({self.layer.operator})"
        return f"{self.piece.network} {name}" if of_several else name


@dataclass(frozen=True)
class Repairer:
    """What a network is made of anew: `pieces` of the run, calibrated on `images`, uint8 [n, C, H, W]."""

    pieces: list[Piece]
    images: Tensor
    info: DatasetInfo
    write: Write

    def __call__(self, court: Court, place: Place) -> None:
        """Add to the manifest the files of a network in `int8-repaired` that pass wherever it failed, with verdicts and cost.

        What cannot be repaired is left as it is, and a note says why. Raises DeviceError.
        """
        pieces, name = [piece for piece in self.pieces if piece.place == place], name_of(place)
        refused = [one for one in court.manifest.refused if one.place == place]
        not_run = {one.cpu_class for one in refused if one.drop_points is None}
        failed = [one for one in refused if one.cpu_class not in not_run and least_drop(one.n) <= one.max_drop_points]
        if any(piece.bits is not None for piece in pieces):
            court.progress.note(f"{name} is not repaired: it was trained quantized, and its scales are its own")
        elif not failed:
            court.progress.note(f"{name} is not repaired: what it lost could not be told: {refused[0].reason}")
        else:
            bounds = dict[Precision, float]()
            for one in failed:
                bounds[one.precision] = max(bounds.get(one.precision, -np.inf), one.upper95_points or 0.0)
            best = min(bounds, key=bounds.__getitem__)
            classes = [*dict.fromkeys(str(one.cpu_class) for one in failed)]
            method = court.deploy.int8.calibration
            self._repair(_Trial(court, place, pieces, classes, self.write, best, method), bounds[best])

    def _repair(self, trial: _Trial, bound: float) -> None:
        kept = [] if trial.passes_with_other_ranges(bound) else fewest(self._ranked(trial), trial.passes)
        manifest, name = trial.court.manifest, name_of(trial.place)
        if kept is None:
            trial.court.progress.note(f"{name} is not repaired: it does not even pass with one layer in int8")
        elif trial.kept == kept or trial.passes(kept):  # the latest candidate may have been another one
            manifest.repaired.append(self._repaired(trial, kept))
        manifest.gates += trial.verdicts

    def _ranked(self, trial: _Trial) -> list[Noisy]:
        """The layers of a network, those first that alone in int8 put the most noise on the output of their piece."""
        found = []
        for piece in trial.pieces:
            graph, ranges = piece.calibrated(self.images, self.info, trial.method)
            given, inputs = piece.takes(self.images, self.info)
            exact = _output(graph, inputs)
            for number, layer in enumerate(of := layers(graph)):
                trial.court.progress.update(f"layers of {piece.network}", number, len(of), layer.name)
                alone = quantize(
                    graph,
                    ranges,
                    piece.pixels(self.info),
                    self.info.shape,
                    FORMS[trial.form],
                    in_float=apart(graph, layer),
                )
                noise = float(((_output(alone, given) - exact) ** 2).sum())
                found.append(Noisy(piece, layer, Signal(signal=float((exact**2).sum()), noise=noise).sqnr_db))
            trial.court.progress.finish()
        return sorted(found, key=lambda one: one.sqnr_db)

    def _repaired(self, trial: _Trial, kept: list[Noisy]) -> Repaired:
        """What the files that pass are, and what they take beside those of int8 that failed."""
        court, (network, role) = trial.court, trial.place
        before, after = court.times(trial.place, "int8", REPAIRED)
        ratios = [new / old for new, old in zip(after.round_p50_ms, before.round_p50_ms, strict=True)]
        ratio, interval = ratio_interval(ratios)
        return Repaired(
            network=network,
            role=role,
            form=trial.form,
            calibrated_by=trial.method,
            in_float={
                one.label(of_several=len(trial.pieces) > 1): round(one.sqnr_db, 2) if np.isfinite(one.sqnr_db) else None
                for one in kept
            },
            layers=sum(
                len(layers(piece.calibrated(self.images, self.info, trial.method)[0])) for piece in trial.pieces
            ),
            bytes=after.file_bytes,
            int8_bytes=before.file_bytes,
            latency_ms_p50=after.latency_ms_p50,
            int8_latency_ms_p50=before.latency_ms_p50,
            latency_ratio=ratio,
            latency_ratio_ci95=interval,
            threads=court.bench.threads,
            cpu_class=court.here,
        )


@dataclass
class _Trial:
    """One candidate after another for a place: its files are those of the latest one, and so are verdicts and bound."""

    court: Court
    place: Place
    pieces: list[Piece]
    cpu_classes: list[str]
    write: Write
    form: Precision  # of what is in int8
    method: Calibration
    kept: Sequence[Noisy] = ()
    verdicts: list[GateResult] = field(default_factory=list)

    @property
    def bound(self) -> float:
        """The largest upper bound of the drop that was found."""
        return max(one.upper95_points or 0.0 for one in self.verdicts)

    def passes_with_other_ranges(self, bound: float) -> bool:
        """Whether another method finds ranges with which it passes; where none does, the method with the lowest bound stays.

        `bound` is that of the first one.
        """
        bounds = {self.method: bound}
        for method in [method for method in get_args(Calibration) if method != self.method]:
            self.method = method
            if self.passes([]):
                return True
            bounds[method] = self.bound
        self.method = min(bounds, key=bounds.__getitem__)
        return False

    def passes(self, kept: Sequence[Noisy]) -> bool:
        """Whether a candidate passes on every CPU class; the first on which it does not is the last that is asked."""
        manifest, self.kept = self.court.manifest, kept
        before = {piece.file_name(REPAIRED) for piece in self.pieces}
        manifest.files = [file for file in manifest.files if file.path not in before]
        for piece in self.pieces:
            in_float = [node for one in kept if one.piece is piece for node in one.layer.nodes]
            made = Repair(form=self.form, calibrated_by=self.method, in_float=in_float)
            manifest.files.append(self.write(piece, REPAIRED, made))
        self.verdicts = []
        for cpu_class in self.cpu_classes:
            (verdict,) = self.court.verdicts(cpu_class, [self.place], REPAIRED)
            number = f"{len(kept)} layer{'s' * (len(kept) != 1)}" if kept else "no layer"
            reason = f"{verdict.reason}; it is {self.form} with {self.method} ranges, and {number} in float"
            self.verdicts.append(verdict.model_copy(update={"reason": reason}))
            self.court.progress.note(reason)
            if not verdict.passed:
                return False
        return True


def _output(graph: onnx.ModelProto, samples: Tensor) -> NDArray[np.float32]:
    """What a graph gives for `samples`, float32 [n, ...], computed without fusing."""
    name = graph.graph.output[0].name
    return np.concatenate([part[name] for part in activations(graph, samples.numpy(), [name])])


def fewest(ranked: Sequence[_T], passes: Callable[[Sequence[_T]], bool]) -> list[_T] | None:
    """The fewest of `ranked` that pass, none of which can be left out; None when not even all but the last one pass.

    So many of the first that they pass: 1, 2, 4 and so on, then by halves; then each of them is left out once.
    """
    failed, number, most = 0, 1, len(ranked) - 1
    while failed < most and not passes(ranked[: (number := min(number, most))]):
        failed, number = number, 2 * number
    if failed >= most:
        return None
    while number - failed > 1:
        middle = (failed + number) // 2
        failed, number = (failed, middle) if passes(ranked[:middle]) else (middle, number)
    kept = list(ranked[:number])
    for place in reversed(range(number - 1)):
        if passes(fewer := kept[:place] + kept[place + 1 :]):
            kept = fewer
    return kept


def sentences(manifest: Manifest) -> list[str]:
    """What was repaired, how, and what it costs."""
    said = []
    for one in manifest.repaired:
        kept = f"{len(one.in_float)} of {one.layers} layers" if one.in_float else "no layer"
        why = ", ".join(name if db is None else f"{name} {db:.1f} dB" for name, db in one.in_float.items())
        said.append(
            f"{name_of((one.network, one.role))} passes as {one.form} with {one.calibrated_by} ranges and {kept} in float."
            + (f" Signal over noise of its output with one of them alone in int8: {why}." if why else "")
        )
        interval = one.latency_ratio_ci95
        sure = "" if interval is None else f", {interval[0]:.2f} to {interval[1]:.2f}"
        said.append(
            f"That takes {one.latency_ms_p50:.3f} ms against {one.int8_latency_ms_p50:.3f} of the int8 that failed "
            f"({one.latency_ratio:.2f} times{sure}; {one.cpu_class}, threads: {one.threads}), in {one.bytes / 1000:,.0f} kB "
            f"against {one.int8_bytes / 1000:,.0f}."
        )
    return said
