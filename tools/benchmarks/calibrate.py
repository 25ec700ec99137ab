"""Time and memory of looking for the ranges of a large network's activations."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import torch
from torchvision.models import resnet50

from benchmarks import MACHINE
from exporters.calibration import Calibration, ranges
from exporters.float32 import PIXELS, to_graph
from kdedge.devices.runner import device, peak_rss_bytes

IMAGENET = (3, 224, 224)


def measure(images: int) -> dict[str, Any]:
    """Seconds and peak memory of each calibrator on a ResNet-50 of torchvision, untrained."""
    spawn, rows = multiprocessing.get_context("spawn"), []
    with tempfile.TemporaryDirectory() as folder:
        graph = to_graph(resnet50().eval(), torch.zeros(2, *IMAGENET), PIXELS, "logits")
        (path := Path(folder) / "resnet50.onnx").write_bytes(graph.SerializeToString())
        for method in get_args(Calibration):
            with spawn.Pool(1) as pool:
                rows.append(pool.apply(_calibrated, (path, images, method)))
    found = device()
    versions = {name: version(name) for name in ("onnxruntime", "torch", "torchvision", "numpy")}
    return {
        "rows": rows,
        "images": images,
        "shape": list(IMAGENET),
        "device": {key: found[key] for key in MACHINE},
        "versions": versions,
    }


def _calibrated(path: Path, images: int, method: Calibration) -> dict[str, Any]:
    """What a calibrator takes: seconds, and the peak of this process's memory, the images among it."""
    samples = np.random.default_rng(0).standard_normal((images, *IMAGENET), np.float32)
    began = time.perf_counter()
    ranges(onnx.load(path), samples, method)
    seconds = round(time.perf_counter() - began, 1)
    return {"calibrator": method, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def show(result: dict[str, Any]) -> None:
    """Print a line a calibrator."""
    print(f"ResNet-50, {result['images']} images of {'x'.join(map(str, result['shape']))}")
    for row in result["rows"]:
        print(f"{row['calibrator']:12} {row['seconds']:>8.1f} s  {row['peak_rss_bytes'] / 2**30:>6.2f} GiB")
