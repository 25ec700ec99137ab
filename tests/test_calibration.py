"""Ranges of activations: each method against its formula in numpy, and how much memory they take."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from test_int8 import constants

from exporters.calibration import BINS, SHARES, activations, histogram, least_squares, percentile, ranges
from exporters.int8 import quantize

RANDOM = np.random.default_rng(0)
LONG_TAILS = RANDOM.standard_t(3, 200_000).astype(np.float32)


def product(weight: NDArray[np.float32]) -> onnx.ModelProto:
    """x float32 [batch, n] -> its product with `weight`, then what of that is positive, then its sum."""
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["product"], "product"),
        helper.make_node("Relu", ["product"], ["positive"], "relu"),
        helper.make_node("MatMul", ["positive", "ones"], ["y"], "sum"),
    ]
    ones = np.ones((weight.shape[1], 1), np.float32)
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", weight.shape[0]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 1])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(ones, "ones")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def counted(values: NDArray[np.float32]) -> tuple[NDArray[np.int64], float, float]:
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    return histogram(values, low, high), low, high


def squared_error(values: NDArray[np.float64], low: float, high: float) -> float:
    """Of uint8 with the zero point of ONNX: 256 levels from `low` to `high`, moved so that 0 is one of them."""
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    levels = np.clip(np.round(values / scale) + zero, 0, 255)
    return float((((levels - zero) * scale - values) ** 2).sum())


def test_minmax_is_the_smallest_and_the_largest_value_of_all_samples() -> None:
    weight, samples = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((5, 7), (150, 5)))
    found = ranges(product(weight), samples)
    expected = {"x": samples, "product": samples @ weight, "positive": np.maximum(samples @ weight, 0)}
    expected["y"] = expected["positive"].sum(1)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert np.concatenate(found[name].range_value) == pytest.approx([values.min(), values.max()], rel=1e-6)


def test_activations_are_those_of_all_samples_in_their_order() -> None:
    weight, samples = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((5, 7), (150, 5)))
    parts = [*activations(product(weight), samples, ["x", "product"])]
    assert [len(part["x"]) for part in parts] == [64, 64, 22] and set(parts[0]) == {"x", "product"}
    assert np.array_equal(np.concatenate([part["x"] for part in parts]), samples)
    assert np.concatenate([part["product"] for part in parts]) == pytest.approx(samples @ weight, abs=1e-5)


def test_the_histogram_is_that_of_numpy() -> None:
    values = LONG_TAILS.reshape(100, 20, 100)
    expected = np.histogram(values.astype(np.float64), BINS, (-8, 8))[0]
    expected[0] += (values < -8).sum()
    expected[-1] += (values > 8).sum()
    assert np.array_equal(histogram(values, -8, 8), expected)


def test_percentile_leaves_out_as_much_as_it_may_and_one_bin_less_would_be_too_much() -> None:
    counts, low, high = counted(LONG_TAILS)
    bottom, top = percentile(counts, low, high)
    assert low < bottom < 0 < top < high
    bin_width, left_out = (high - low) / BINS, len(LONG_TAILS) * 0.00005
    for beyond, one_bin_more in (
        (bottom - LONG_TAILS, bottom + bin_width - LONG_TAILS),
        (LONG_TAILS - top, LONG_TAILS - top + bin_width),
    ):
        assert np.count_nonzero(beyond > 0) <= left_out < np.count_nonzero(one_bin_more > 0)


def test_percentile_by_hand() -> None:
    """Of 40,000 values, 2 at each end may be left out; 0 stays a level."""
    counts = np.zeros(BINS, np.int64)
    counts[[0, 1, BINS // 2, BINS - 1]] = 1, 1, 39_995, 3
    assert percentile(counts, -1.0, 1.0) == (0.0, 1.0)
    counts[[BINS // 2, BINS - 1]] = 39_996, 2
    assert percentile(counts, -1.0, 1.0) == (0.0, 2 / BINS)


@pytest.mark.parametrize("values", [LONG_TAILS, np.maximum(LONG_TAILS, 0), -np.abs(LONG_TAILS), LONG_TAILS[:500]])
def test_mse_is_the_best_of_all_its_candidates(values: NDArray[np.float32]) -> None:
    """A search by brute force over the values themselves finds no pair that is better by more than the bins blur."""
    counts, low, high = counted(values)
    exact = values.astype(np.float64)
    pairs = [(low * a, high * b) for a in SHARES[::2] for b in SHARES[::2] if low * a < high * b]
    expected = min(squared_error(exact, *pair) for pair in dict.fromkeys(pairs))
    found = least_squares(counts, low, high)
    assert squared_error(exact, *found) <= 1.001 * expected
    assert found[0] / low in SHARES if low else found[0] == 0


def test_mse_by_hand() -> None:
    """n values evenly from 0 to 1 and one of 16. Clipping to c errs by (16 - c)^2, rounding by n c^2 / (12 * 255^2): the least
    sum is at c = 16 / (1 + n / 780,300)."""
    for n, c in ((78, 16), (780_300, 8), (3 * 780_300, 4), (7 * 780_300, 2)):
        values = np.append(np.linspace(0, 1, n), 16).astype(np.float32)
        assert least_squares(*counted(values)) == (0, c)


def test_what_is_0_throughout_and_what_is_never_0() -> None:
    weight = np.array([[1, 0]], np.float32)
    samples = np.linspace(3, 5, 100, dtype=np.float32)[:, None]
    for method in ("percentile", "mse"):
        found = {
            name: np.concatenate(data.range_value) for name, data in ranges(product(weight), samples, method).items()
        }
        assert found["x"].tolist() == found["product"].tolist() == [0, 5]
        nothing = ranges(product(0 * weight), samples, method)["product"].range_value
        assert [float(end[0]) for end in nothing] == [0, 0]


def test_the_file_gets_the_range_that_was_found() -> None:
    weight = np.eye(4, dtype=np.float32)
    samples = RANDOM.random((70_000, 4)).astype(np.float32)
    samples[0, 0] = 16  # the formula above has its least error at 11.8
    for method, high in (("minmax", 16), ("percentile", 1), ("mse", 16 / 2**0.5)):
        model = quantize(product(weight), ranges(product(weight), samples, method), None, None)
        quantizing = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
        (made,) = (node for node in quantizing if node.input[0] != "x")
        scale, zero_point = (constants(model)[name] for name in made.input[1:])
        assert float(scale) == pytest.approx(high / 255, rel=0.005) and int(zero_point) == 0


MEMORY = """
import resource
import numpy as np
from exporters import calibration
from test_calibration import product
calibration.BYTES = 2**23
graph, samples = product(np.ones((1, 2**18), np.float32)), np.arange(64, dtype=np.float32)[:, None]
calibration.ranges(graph, samples[:8], "mse")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
calibration.ranges(graph, samples, "mse")
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """64 samples of two activations of 1 MiB each: kept, they would be 128 MiB. 8 MiB may be in use at a time."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2**25
