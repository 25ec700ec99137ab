"""Graphs of pieces with equal layers, which are traced once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from kdedge.pieces import Arithmetic, Piece


def member() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))


def without_bias(layers: nn.Sequential) -> None:
    nn.init.zeros_(layers[1].bias)  # type: ignore[arg-type]


def with_equal_biases(layers: nn.Sequential) -> None:
    layers[3].load_state_dict({**layers[3].state_dict(), "bias": layers[1].bias.detach()})


@pytest.mark.parametrize("change", [without_bias, with_equal_biases])
@pytest.mark.parametrize("first", [True, False])
def test_a_member_whose_weights_the_exporter_leaves_out_has_its_own_graph(
    change: Callable[[nn.Sequential], None], first: bool
) -> None:
    """Of a bias of zeros, or of one of two equal ones, nothing is left in the graph that the members would share."""
    members, example = [member(), member()], torch.randn(3, 1, 4, 4)
    change(members[0 if first else 1])
    shared: dict[Arithmetic, onnx.ModelProto] = {}
    for number, module in enumerate(members):
        graph = Piece(f"students.{number}", "member", module, "dense", traced=shared).graph(example)
        session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: example.numpy()})
        np.testing.assert_allclose(found, module(example).detach().numpy(), atol=1e-5)
