"""The check that stands between a wrong graph and a user."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from random_networks import data_of, images, network, pixels_of
from torch import nn

from exporters.float32 import ExportError, from_pixels, to_graph
from exporters.parity import TOLERANCE, check, check_trained
from kdedge.data.batches import normalise

INFO = data_of("mlp-30")
GIVEN = images(20, INFO)
INPUTS = normalise(GIVEN, INFO)
MODULE = network("mlp-30")


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return from_pixels(to_graph(MODULE, INPUTS[:2], "pixels", "logits"), pixels_of(INFO), INFO.shape)


@pytest.fixture
def path(graph: onnx.ModelProto, tmp_path: Path) -> Path:
    onnx.save(graph, tmp_path / "mlp.onnx")
    return tmp_path / "mlp.onnx"


def change_bias(path: Path, by: float) -> None:
    """Add `by` to one logit."""
    graph = onnx.load(path)
    (bias,) = (value for value in graph.graph.initializer if list(value.dims) == [10])
    values = numpy_helper.to_array(bias).copy()
    values[3] += by
    bias.CopyFrom(numpy_helper.from_array(values, bias.name))
    onnx.save(graph, path)


@pytest.mark.parametrize("count", [1, 4, 9, 20])
def test_a_faithful_file_passes_with_any_number_of_samples(path: Path, count: int) -> None:
    assert 0 <= check(path, MODULE, GIVEN[:count].numpy(), INPUTS[:count]) < 1e-5


def test_the_largest_difference_is_reported(path: Path) -> None:
    with torch.no_grad():
        allowed = TOLERANCE * float(np.ptp(MODULE(INPUTS).numpy()))
    change_bias(path, 0.5 * allowed)
    assert check(path, MODULE, GIVEN.numpy(), INPUTS) == pytest.approx(0.5 * allowed, rel=0.1)


@pytest.mark.parametrize("by", [0.01, -1.0, float("nan")])
def test_a_file_that_computes_something_else_is_refused(path: Path, by: float) -> None:
    change_bias(path, by)
    with pytest.raises(ExportError, match=r"mlp\.onnx differs from the network by .+ allowed"):
        check(path, MODULE, GIVEN.numpy(), INPUTS)


def test_training_mode_does_not_change_what_is_compared(path: Path) -> None:
    module = nn.Sequential(MODULE, nn.Dropout(0.9)).train()
    assert check(path, module, GIVEN.numpy(), INPUTS) < 1e-5


def test_of_what_was_trained_quantized_the_classes_are_compared(path: Path) -> None:
    """A logit that is 1 too high makes its class the highest too often."""
    assert check_trained(path, MODULE, GIVEN.numpy(), INPUTS, of_classes=True) == (pytest.approx(0, abs=1e-5), 100)
    change_bias(path, 1)
    assert check_trained(path, MODULE, GIVEN.numpy(), INPUTS, of_classes=False) == (pytest.approx(1, rel=1e-4), None)
    agreeing = 100 * float((MODULE(INPUTS) + torch.eye(10)[3]).argmax(1).eq(MODULE(INPUTS).argmax(1)).float().mean())
    differing = round(20 - agreeing / 5)
    assert differing > 1
    with pytest.raises(
        ExportError, match=rf"mlp\.onnx gives another class .+ on {differing} of 20 samples, where 99\.9%"
    ):
        check_trained(path, MODULE, GIVEN.numpy(), INPUTS, of_classes=True)


def test_one_image_may_lie_between_two_classes_however_few_there_are(path: Path) -> None:
    """99.9% of 20 is all of them."""
    with torch.no_grad():
        logits = MODULE(INPUTS)
    wins = (logits.max(1).values - logits[:, 3]).sort().values
    step = float(wins[wins > 0][:2].mean())  # more than the first one, and less than the second, is short of
    change_bias(path, step)
    assert check_trained(path, MODULE, GIVEN.numpy(), INPUTS, of_classes=True)[1] == pytest.approx(95)
