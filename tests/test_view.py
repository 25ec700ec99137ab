"""What networks see of an image: against numpy, and in the files that are deployed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from random_networks import answers, data_of, images, network, pixels_of
from tiny_export import float_nodes
from torch import nn

from exporters.calibration import ranges
from exporters.float32 import from_pixels, to_graph
from exporters.int8 import quantize
from kdedge.data.batches import normalise
from kdedge.models.view import Centre, LowResolution


@pytest.mark.parametrize(("side", "block"), [(4, 2), (2, 4), (1, 8)])
def test_low_resolution_is_the_mean_of_each_block(side: int, block: int) -> None:
    given = np.random.default_rng(0).normal(size=(3, 2, 8, 8))
    means = given.reshape(3, 2, side, block, side, block).mean((3, 5))
    expected = np.kron(means, np.ones((block, block)))
    np.testing.assert_allclose(LowResolution(side)(torch.from_numpy(given)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize(("side", "rows"), [(4, slice(2, 6)), (1, slice(3, 4)), (7, slice(0, 7))])
def test_the_centre_is_left_and_the_rest_is_grey(side: int, rows: slice) -> None:
    given = np.random.default_rng(0).normal(size=(3, 2, 8, 8))
    expected = np.zeros_like(given)
    expected[:, :, rows, rows] = given[:, :, rows, rows]
    assert np.array_equal(Centre(side)(torch.from_numpy(given)).numpy(), expected)


def test_images_stay_channels_last() -> None:
    given = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    for view in (LowResolution(4), Centre(4)):
        assert view(given).is_contiguous(memory_format=torch.channels_last)


VIEWS = {"low": [LowResolution(4)], "centre": [Centre(12)], "both": [LowResolution(4), Centre(12)]}


@pytest.mark.parametrize(
    ("models", "view", "in_float"),
    [
        (["tcn-student-4"] * 2, "low", []),
        (["tcn-student-4"] * 2, "both", []),
        (["mlp-30"], "low", []),
        (["mlp-30"], "centre", ["node_pad (Pad)"]),  # before a convolution the padding becomes the convolution's
        (["resnet-1-1-0-0"], "both", []),
    ],
)
def test_what_is_deployed_sees_the_same(models: list[str], view: str, in_float: list[str], tmp_path: Path) -> None:
    """Whole images go into the file. Means of pixels are rounded to whole ones there, and nothing else changes."""
    info, module = data_of(models[0]), network(*models)
    module.members = nn.ModuleList(nn.Sequential(*VIEWS[view], member) for member in module.members)
    given = images(64, info)
    samples = normalise(given, info)
    expected = answers(module, given, info).numpy()
    graph = to_graph(module, samples[:2], "pixels", "logits")

    found = run(from_pixels(graph, pixels_of(info), info.shape), given.numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.ptp(expected))
    int8 = quantize(graph, ranges(graph, samples.numpy()), pixels_of(info), info.shape)
    found = run(int8, given.numpy())
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
    onnx.save(int8, tmp_path / "int8.onnx")
    assert float_nodes(tmp_path / "int8.onnx") == in_float


def run(graph: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": image})[0])
