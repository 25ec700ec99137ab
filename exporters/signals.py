"""The layers of a graph that is quantized, and how near what each gives in int8 is to what it gives in float32."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from exporters.calibration import BINS, Counts, activations, batch_size, histogram
from exporters.int8 import MOVES_ONLY

ACTIVATIONS = ("Relu", "Clip")  # part of the layer before them, whose range then says the same
RARE = 0.005  # of a layer's values, at either end, do not count as use of its range


@dataclass(frozen=True)
class Layer:
    """A node that computes, with the activation after it."""

    name: str
    operator: str
    nodes: tuple[str, ...]
    gives: str  # its output, in the float32 graph


@dataclass
class Signal:
    """What a layer gives, over all images: sums of squares of float32 and of the error of int8, and how its range is used."""

    values: int = 0
    signal: float = 0.0
    noise: float = 0.0
    clipped: int = 0  # values that lie more than half a step beyond the range
    counts: Counts | None = field(
        default=None, repr=False
    )  # histogram over the range; none where the output is not rounded

    @property
    def sqnr_db(self) -> float:
        """Signal-to-quantization-noise ratio, 10 log10 of the ratio of the two sums of squares; infinite without noise."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    @property
    def clipped_share(self) -> float | None:
        return None if self.counts is None else self.clipped / self.values

    @property
    def used_share(self) -> float | None:
        """The part of the range that holds all values but the rare ones."""
        if self.counts is None:
            return None
        rare = RARE * self.counts.sum()
        first, last = (
            np.searchsorted(np.cumsum(side), rare, side="right") for side in (self.counts, self.counts[::-1])
        )
        return float(BINS - last - first) / BINS


def layers(graph: onnx.ModelProto) -> list[Layer]:
    """The layers of a float32 graph, in its order."""
    readers = defaultdict[str, list[onnx.NodeProto]](list)
    for node in graph.graph.node:
        for name in node.input:
            readers[name].append(node)
    found = []
    for node in graph.graph.node:
        if node.op_type in (*MOVES_ONLY, *ACTIVATIONS):
            continue
        after = readers[node.output[0]]
        whole = [node, *after] if [one.op_type in ACTIVATIONS for one in after] == [True] else [node]
        found.append(Layer(node.name, node.op_type, tuple(one.name for one in whole), whole[-1].output[0]))
    return found


def apart(graph: onnx.ModelProto, layer: Layer) -> list[str]:
    """All nodes but those of a layer: what is in float when it is alone in int8."""
    return [node.name for node in graph.graph.node if node.name not in layer.nodes]


def signals(
    of: list[Layer], float32: onnx.ModelProto, int8: onnx.ModelProto, images: NDArray[np.uint8]
) -> dict[str, Signal]:
    """The signal of each layer, by its name, of two graphs that take `images` uint8 [n, C, H, W]."""
    grids = {layer: _Grid(int8, layer) for layer in of}
    found = {
        layer.name: Signal(counts=np.zeros(BINS, np.int64) if grid.step else None) for layer, grid in grids.items()
    }
    batch = min(batch_size(float32), batch_size(int8))
    exactly = activations(float32, images, [layer.gives for layer in grids], batch)
    in_int8 = activations(int8, images, [grid.gives for grid in grids.values()], batch)
    for exact, rounded in zip(exactly, in_int8, strict=True):
        for layer, grid in grids.items():
            one, values = found[layer.name], exact[layer.gives].astype(np.float64)
            one.values += values.size
            one.signal += float((values**2).sum())
            one.noise += float(((rounded[grid.gives] - values) ** 2).sum())
            if one.counts is not None:
                beyond = (values < grid.low - grid.step / 2) | (values > grid.high + grid.step / 2)
                one.clipped += int(np.count_nonzero(beyond))
                one.counts += histogram(exact[layer.gives], grid.low, grid.high)
    return found


class _Grid:
    """Where a layer's output is found in the int8 graph, and the range that it is rounded in; a step of 0 without rounding."""

    def __init__(self, int8: onnx.ModelProto, layer: Layer) -> None:
        makers = {node.name: node for node in int8.graph.node}
        readers = {node.input[0]: node for node in int8.graph.node}
        known = {value.name: value for value in int8.graph.initializer}
        last = next(makers[name] for name in reversed(layer.nodes) if name in makers)
        self.gives, self.step, self.low, self.high = last.output[0], 0.0, 0.0, 0.0
        quantizing = readers.get(self.gives)
        if quantizing is not None and quantizing.op_type == "QuantizeLinear":
            step, zero_point = (numpy_helper.to_array(known[name]) for name in quantizing.input[1:])
            ends = np.iinfo(zero_point.dtype)
            self.gives, self.step = readers[quantizing.output[0]].output[0], float(step)
            self.low, self.high = ((end - int(zero_point)) * self.step for end in (ends.min, ends.max))
