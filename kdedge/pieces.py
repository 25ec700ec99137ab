"""What is exported of a run: each network as one piece, and of a group that ships its members and its head as well, and the
group as it was trained, for devices on which what it is rewritten into is not the fastest.

A piece is one module that becomes one file a precision. It knows its graph, and the ranges that int8 takes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from exporters.calibration import Calibration, Ranges, ranges
from exporters.float32 import PIXELS, PixelScale, to_graph, with_weights
from kdedge.data.batches import normalise, pixel_scale
from kdedge.data.catalog import DatasetInfo
from kdedge.data.load import Dataset
from kdedge.errors import RunError
from kdedge.manifest import Place, Precision, Role
from kdedge.models.network import Network
from kdedge.models.rewriting import for_float32, for_int8, rewritten
from kdedge.networks import finished_network
from kdedge.plan import in_order
from kdedge.quantize.layers import in_float, rounded
from kdedge.recipe import Recipe
from kdedge.store import Run


def roles(recipe: Recipe) -> list[tuple[str, Role]]:
    """What is exported: networks that others learn from are teachers, what nobody learns from is merged and shipped.

    Who learns comes after its teachers, so the first one is who taught all others. A network that learns what another
    leaves over is exported as a member of what is made of it: alone it says nothing.
    """
    taught_from = {teacher for network in recipe.networks.values() for teacher in network.teachers}
    return [
        (name, "teacher" if name in taught_from or len(recipe.networks) == 1 else "merged")
        for name in in_order(recipe)
        if not recipe.networks[name].learns_the_rest
    ]


Arithmetic = Literal["fp32", "int8"]
SHARED = {"fp32": for_float32, "int8": for_int8}


@dataclass(frozen=True)
class Piece:
    """One module that becomes one file a precision."""

    network: str  # as the manifest has it
    role: Role
    module: nn.Module
    gives: str  # "dense" or "logits"
    calibrate: Network | None = None  # of a head: the network whose dense vectors it takes, instead of images
    bits: int | None = None  # of weights that were trained quantized
    traced: dict[Arithmetic, onnx.ModelProto] = field(default_factory=dict)  # shared by members with equal layers
    found: dict[Calibration, tuple[onnx.ModelProto, Ranges]] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        """The network that it is of, and the role of the file that completes it."""
        return (self.network.rpartition(".")[0], "head") if self.role == "member" else (self.network, self.role)

    @property
    def input_name(self) -> str:
        return PIXELS if self.calibrate is None else "dense"

    @property
    def in_float(self) -> nn.Module:
        return self.module if self.bits is None else in_float(rounded(self.module))

    def graph(self, example: Tensor, form: Arithmetic = "fp32") -> onnx.ModelProto:
        """Its graph in float, of a network rewritten into the layers that are fast in the form that its file will have.

        Members, heads and what is plain stay as they are, and so does what was trained quantized: each of its layers has scales
        of its own.
        """
        module = self.in_float
        if self.bits is None and self.role != "plain" and isinstance(module, Network):
            form = form if len(module.members) > 1 else "fp32"  # in both the same, traced once
            module = rewritten(module, example, SHARED[form])
        else:
            form = "fp32"
        known = self.traced.get(form)
        graph = None if known is None else with_weights(known, module)
        if graph is None:
            graph = self.traced[form] = to_graph(module, example, self.input_name, self.gives)
        return graph

    def calibrated(self, images: Tensor, info: DatasetInfo, method: Calibration) -> tuple[onnx.ModelProto, Ranges]:
        """Its graph in float as int8 is made of it, and the ranges of its tensors on the calibration images, which are
        uint8 [n, C, H, W] and always the same: what was found once by a method is not looked for again.
        """
        if method not in self.found:
            _, samples = self.takes(images, info)
            graph = self.graph(samples[:2], "int8")
            self.found[method] = graph, ranges(graph, np.ascontiguousarray(samples.numpy()), method)
        return self.found[method]

    def pixels(self, info: DatasetInfo) -> PixelScale | None:
        """How its file's input is scaled; None where that is no image."""
        return PixelScale(info.mean, pixel_scale(info)) if self.calibrate is None else None

    def takes(self, images: Tensor, info: DatasetInfo) -> tuple[Tensor, Tensor]:
        """What the file takes for `images`, uint8 [n, C, H, W], and what the module takes."""
        inputs = normalise(images, info)
        if self.calibrate is None:
            return images, inputs
        with torch.no_grad():
            dense = self.calibrate.dense(inputs)
        return dense, dense

    def file_name(self, precision: Precision) -> str:
        part = f".{self.role}" if self.role in ("head", "merged", "plain") else ""
        return f"{self.network}{part}.{precision}.onnx"


def pieces_of(name: str, role: Role, network: Network, recipe: Recipe) -> Iterator[Piece]:
    """A network, and if it is a group that is shipped, its members and its head as well, and the group as it was trained."""
    quantize = recipe.networks[name].quantize
    bits = None if quantize is None else quantize.weights
    if role == "merged" and recipe.networks[name].is_group:
        views, traced = recipe.views(name), defaultdict[Any, dict[Arithmetic, onnx.ModelProto]](dict)
        for number, member in enumerate(network.members):
            layers = network.models[number], views[number]
            yield Piece(f"{name}.{number}", "member", member, "dense", bits=bits, traced=traced[layers])
        yield Piece(name, "head", network.head, "logits", calibrate=network, bits=bits)
    yield Piece(name, role, network, "logits", bits=bits)
    if role == "merged" and len(network.members) > 1 and bits is None:  # else the graph above is that
        yield Piece(name, "plain", network, "logits")


def finished(run: Run, recipe: Recipe, name: str) -> Network:
    """The network with the weights that the last of its stages gave it."""
    last = [record.name for record in run.stages if record.network == name][-1]
    return finished_network(run, recipe, name, last).with_one_head()


def quantizable(
    run: Run, recipe: Recipe, dataset: Dataset, name: str, role: Role
) -> tuple[onnx.ModelProto, Ranges, PixelScale]:
    """What the int8 file of a whole network is made of: its graph in float, of normalised pixels, with the ranges of its tensors.

    Raises RunError for a network that was trained quantized: it brings its ranges.
    """
    if recipe.networks[name].quantize is not None:
        raise RunError(
            f"{name!r} was trained quantized: it has no float32 network beside it that its layers can be held against"
        )
    piece = next(one for one in pieces_of(name, role, finished(run, recipe, name), recipe) if one.role == role)
    calibration = torch.from_numpy(dataset.train_images[run.data["calibration"]])
    graph, found = piece.calibrated(calibration, dataset.info, recipe.deploy.int8.calibration)
    return graph, found, PixelScale(dataset.info.mean, pixel_scale(dataset.info))
