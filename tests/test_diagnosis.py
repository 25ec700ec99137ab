"""The story of `diagnose`, on a network one of whose layers int8 ruins, and the figures by themselves."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from test_calibration import product
from test_int8 import constants
from tiny_export import labelled_images, write_data, write_run

from exporters.calibration import BINS, ranges
from exporters.float32 import PixelScale
from exporters.int8 import quantize
from exporters.signals import Signal, layers, signals
from kdedge.cli import main
from kdedge.diagnosis import Diagnosis, diagnose, picture, rows_to_print, sentences
from kdedge.errors import RunError
from kdedge.store import Run, open_run

N = 200
PIXELS = PixelScale(0, 1 / 255)


def ruined() -> onnx.ModelProto:
    """The class is the brightest of the first ten pixels. Each filter has a large weight as well, for a pixel that is always
    black: in int8 it leaves one level to all others."""
    first = np.zeros((784, 10), np.float32)
    first[np.arange(10), np.arange(10)] = 1
    first[700] = 1000
    nodes = [
        helper.make_node("Flatten", ["pixels"], ["flat"], "flatten"),
        helper.make_node("MatMul", ["flat", "first"], ["product"], "ruined"),
        helper.make_node("Relu", ["product"], ["positive"], "relu"),
        helper.make_node("MatMul", ["positive", "second"], ["logits"], "sound"),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(np.eye(10, dtype=np.float32), "second")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of one network, which is diagnosed as if it were the ruined one."""
    run = write_run(tmp_path / "tiny", write_data(tmp_path / "data", N))
    run.data["validation"] = list(range(N))
    run.write()
    graph, samples = ruined(), (labelled_images(N)[0] / 255).astype(np.float32)
    monkeypatch.setattr("kdedge.diagnosis.quantizable", lambda *_: (graph, ranges(graph, samples), PIXELS))
    return open_run(run.path)


def test_the_layer_that_int8_ruins_is_to_blame(run: Run, tmp_path: Path) -> None:
    found = diagnose(run, "teacher", data_dir=tmp_path / "data")
    assert (found.n, found.accuracy_fp32, found.int8.drop_points, found.int8.differing) == (N, 100, 90, 180)
    bad, good = found.layers
    assert (bad.name, good.name) == ("ruined", "sound")
    assert (bad.alone.drop_points, bad.all_but.drop_points, bad.to_blame) == (90, 0, True)
    assert (good.alone.drop_points, good.all_but.drop_points, good.to_blame) == (0, 90, False)
    assert (bad.sqnr_db, bad.clipped_percent, bad.range_used_percent) == (
        0,
        0,
        100,
    )  # its output is 0, instead of 0 and 1
    assert (good.clipped_percent, good.range_used_percent) == (None, None)
    assert "ruined (MatMul) is to blame: with it in float 0 of 200 images differ, instead of 180" in sentences(found)
    written = json.loads((run.path / "diagnosis" / "teacher.json").read_text())
    assert written == found.model_dump(mode="json")


def test_the_command_prints_a_table_of_80_columns_and_draws_a_picture(run: Run, tmp_path: Path) -> None:
    where = ["--data-dir", str(tmp_path / "data")]
    printed = CliRunner().invoke(main, ["diagnose", str(run.path), "teacher", *where])
    assert printed.exit_code == 0, printed.output
    table = [line for line in printed.stdout.splitlines() if "(MatMul)  " in line or "SQNR" in line]
    assert len(table) == 3 and max(map(len, table)) <= 80
    document = json.loads(
        CliRunner().invoke(main, ["diagnose", "teacher", "--runs", str(tmp_path), *where, "--json"]).stdout
    )
    assert document == json.loads((run.path / "diagnosis" / "teacher.json").read_text())
    assert CliRunner().invoke(main, ["diagnose"]).exit_code == 2
    pytest.importorskip("matplotlib")
    assert (run.path / "diagnosis" / "teacher.png").read_bytes() == picture(Diagnosis.model_validate(document))


def test_names_of_80_columns(run: Run, tmp_path: Path) -> None:
    found = diagnose(run, "teacher", data_dir=tmp_path / "data")
    found.layers[0] = found.layers[0].model_copy(
        update={"name": "node_" + "very_" * 20, "operator": "GlobalAveragePool"}
    )
    header, rows = rows_to_print(found)
    assert sum(max(map(len, column)) + 2 for column in zip(header, *rows, strict=True)) - 2 <= 80


def test_what_cannot_be_diagnosed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny", write_data(tmp_path / "data", N))
    with pytest.raises(RunError, match=r"there is no network 'x' to diagnose\. Networks: teacher\."):
        diagnose(run, "x")
    run.recipe["networks"]["teacher"] |= {"quantize": {}}
    with pytest.raises(RunError, match="'teacher' was trained quantized: it has no float32 network beside it"):
        diagnose(run, "teacher", data_dir=tmp_path / "data")


# The figures


def rounded(values: NDArray[np.float64], scale: np.ndarray, zero: np.ndarray) -> NDArray[np.float64]:
    levels = np.clip(np.round(values / scale) + zero, 0, 255)
    return (levels - zero) * scale


def test_signals_are_those_of_numpy() -> None:
    random = np.random.default_rng(0)
    weight, samples = (
        random.standard_normal((5, 7)).astype(np.float32),
        random.standard_normal((150, 5)).astype(np.float32),
    )
    graph = product(weight)
    int8 = quantize(graph, ranges(graph, samples, "percentile"), None, None)
    known = constants(int8)
    grids = {
        node.input[0]: [known[name] for name in node.input[1:]] for node in int8.graph.node if node.op_type[0] == "Q"
    }
    (after,) = (grid for name, grid in grids.items() if name != "x")
    integers, scale, zero = (known[f"weight_{what}"] for what in ("quantized", "scale", "zero_point"))
    exact = np.maximum(samples.astype(np.float64) @ weight, 0)
    found = rounded(rounded(samples.astype(np.float64), *grids["x"]) @ ((integers - zero.astype(int)) * scale), *after)
    one = signals(layers(graph), graph, int8, samples)["product"]
    assert one.values == exact.size
    assert one.sqnr_db == pytest.approx(10 * np.log10((exact**2).sum() / ((found - exact) ** 2).sum()), abs=0.01)
    assert one.clipped_share == pytest.approx((exact > 255.5 * after[0]).mean(), abs=1e-9)


def test_figures_of_a_signal_by_hand() -> None:
    """100 to 1 is 20 dB. Of 1,000 values 5 may lie beyond the part that counts, at either end."""
    counts = np.zeros(BINS, np.int64)
    counts[[0, BINS // 4, BINS // 2 - 1, BINS - 1]] = 5, 500, 490, 5
    one = Signal(values=1000, signal=100, noise=1, clipped=3, counts=counts)
    assert (one.sqnr_db, one.clipped_share, one.used_share) == (20, 0.003, 0.25)
    assert Signal(values=10, signal=5).sqnr_db == np.inf
    assert Signal(values=10, signal=5).used_share is None


def test_a_layer_has_its_activation_and_what_only_moves_values_is_none() -> None:
    assert [(one.name, one.nodes, one.gives) for one in layers(ruined())] == [
        ("ruined", ("ruined", "relu"), "positive"),
        ("sound", ("sound",), "logits"),
    ]
