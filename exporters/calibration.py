"""Ranges of a graph's activations, from samples, in memory that does not grow with their number.

`minmax` holds all values. The others look for a narrower range in a histogram of them, for which they go over the samples
once more: `percentile` leaves out the rarest values, `mse` takes the ends that 8 bits err least with. onnxruntime has the
first of the three; its others keep the activations of all samples, and its entropy has one range to choose from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, TensorsData

Calibration = Literal["minmax", "percentile", "mse"]
Ranges: TypeAlias = TensorsData  # of onnxruntime: its writer takes them
Counts = NDArray[np.int64]

BATCH = 64  # samples at a time, or as many as have
BYTES = 2**28  # of activations, or one sample
BINS = 4096  # of a histogram
PERCENTILE = 99.99  # of a tensor's values, which its range holds; the rest is left out at both ends alike
SHARES = 0.5 ** (np.arange(33) / 8)  # of smallest and largest value, 1 to 1/16: where `mse` looks for the ends
LEVELS = 255  # steps between them
_BLOCK = 2**16  # values that are counted at a time: fits a cache


def ranges(graph: onnx.ModelProto, samples: NDArray[np.float32], method: Calibration = "minmax") -> Ranges:
    """The smallest and the largest value of each float32 tensor of `graph`, on `samples` [n, ...] of its one input.

    By another method than minmax, a narrower range around 0, beyond which values are clipped.
    """
    names, ends = [*_bytes_per_sample(graph)], dict[str, tuple[float, float]]()
    for values in activations(graph, samples, names):
        for name in names:
            low, high = ends.get(name, (math.inf, -math.inf))
            ends[name] = min(low, float(values[name].min())), max(high, float(values[name].max()))
    if method != "minmax":
        ends = {name: (min(low, 0.0), max(high, 0.0)) for name, (low, high) in ends.items()}
        counts = {name: np.zeros(BINS, np.int64) for name, (low, high) in ends.items() if low < high}
        for values in activations(graph, samples, names):
            for name in counts:
                counts[name] += histogram(values[name], *ends[name])
        ends |= {name: METHODS[method](counts[name], *ends[name]) for name in counts}
    data = {name: tuple(np.array([end], np.float32) for end in both) for name, both in ends.items()}
    found: Ranges = TensorsData(CalibrationMethod.MinMax, data)  # which means: ranges as they are
    return found


def activations(
    graph: onnx.ModelProto, samples: NDArray[np.generic], names: Iterable[str], batch: int | None = None
) -> Iterator[dict[str, NDArray[Any]]]:
    """The tensors `names` of `graph`, computed without fusing, on one `batch` of `samples` [n, ...] after another."""
    given, whole = graph.graph.input[0].name, onnx.ModelProto()
    whole.CopyFrom(graph)
    del whole.graph.output[:]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name != given)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    batch = batch or batch_size(graph)
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        yield {given: part, **dict(zip(outputs, session.run(outputs, {given: part}), strict=True))}


def batch_size(graph: onnx.ModelProto) -> int:
    """As many samples as have BYTES of activations, but BATCH at most, and one at least."""
    return max(1, min(BATCH, BYTES // sum(_bytes_per_sample(graph).values())))


def _bytes_per_sample(graph: onnx.ModelProto) -> dict[str, int]:
    """The float32 tensors of a graph, without its weights, and their sizes, with 1 for the batch."""
    whole = onnx.shape_inference.infer_shapes(graph, strict_mode=True, data_prop=True).graph
    kinds = {value.name: value.type.tensor_type for value in (*whole.input, *whole.value_info, *whole.output)}
    return {
        name: 4 * math.prod(axis.dim_value or 1 for axis in kind.shape.dim)
        for name, kind in kinds.items()
        if kind.elem_type == onnx.TensorProto.FLOAT
    }


def histogram(values: NDArray[np.float32], low: float, high: float) -> Counts:
    """How many of `values` lie in each of BINS equal parts of `low` to `high`; what lies beyond is counted at the ends."""
    counts, flat, width = np.zeros(BINS, np.int64), values.reshape(-1), (high - low) / BINS
    for start in range(0, len(flat), _BLOCK):
        distance = flat[start : start + _BLOCK] - np.float64(low)
        bins = (distance / width).clip(0, BINS - 1).astype(np.int64)
        counts += np.bincount(bins, minlength=BINS)
    return counts


def percentile(counts: Counts, low: float, high: float) -> tuple[float, float]:
    """The narrowest ends, on bins of a histogram from `low` to `high`, that leave out no more than they may on either side."""
    left_out = counts.sum() * (100 - PERCENTILE) / 200
    edges = np.linspace(low, high, BINS + 1)
    first, last = (np.searchsorted(np.cumsum(side), left_out, side="right") for side in (counts, counts[::-1]))
    return min(float(edges[first]), 0.0), max(float(edges[BINS - last]), 0.0)


def least_squares(counts: Counts, low: float, high: float) -> tuple[float, float]:
    """Of all pairs of SHARES of `low` <= 0 and `high` >= 0, the ends with the least squared error of uint8, on a histogram.

    The error is that of rounding within the ends and of clipping beyond them. The widest of equally good ends.
    """
    held = np.flatnonzero(counts)
    counts, values = counts[held], low + (held + 0.5) * ((high - low) / BINS)
    best = np.inf, low, high
    tops = np.unique(high * SHARES)[::-1, None]
    for bottom in np.unique(low * SHARES):
        kept = tops > bottom
        scale = (tops[kept] - bottom)[:, None] / LEVELS
        zero = np.round(-bottom / scale)
        rounded = (np.clip(np.round(values / scale) + zero, 0, LEVELS) - zero) * scale
        errors = (rounded - values) ** 2 @ counts
        if errors.min() < best[0]:
            best = errors.min(), bottom, tops[kept][errors.argmin()]
    return float(best[1]), float(best[2])


METHODS: dict[str, Callable[[Counts, float, float], tuple[float, float]]] = {
    "percentile": percentile,
    "mse": least_squares,
}
