"""Whether a file computes in onnxruntime what its module computes in torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.float32 import ExportError

BATCHES = (1, 3, 5)  # sizes that the export did not see: a batch that was taken for a constant fails on them
TOLERANCE = 1e-4  # of the range of the module's outputs
SMALLEST_AGREEMENT = 99.9  # percent


def check(path: Path, module: nn.Module, given: NDArray[np.generic], inputs: Tensor) -> float:
    """Largest difference between the file on `given` and the module on `inputs`, the same samples [n, ...] as the file
    and as the module take them. Raises ExportError when it is over TOLERANCE of the outputs' range."""
    found, expected = _both(path, module, given, inputs)
    difference = float(np.abs(found - expected).max())
    allowed = TOLERANCE * float(np.ptp(expected))
    if not difference <= allowed:
        raise ExportError(
            f"{path.name} differs from the network by {difference:.3g}, of {allowed:.3g} allowed: onnxruntime computes "
            "something else than torch did"
        )
    return difference


def check_trained(
    path: Path, module: nn.Module, given: NDArray[np.generic], inputs: Tensor, *, of_classes: bool
) -> tuple[float, float | None]:
    """The same for an int8 file whose rounding `module` simulates, and if outputs are `of_classes`, how often it agrees:
    the percentage of samples for which both have the same highest one.

    A float that lies between two integers may be rounded to either, so outputs may differ by a step of theirs. Raises
    ExportError when the classes agree on less than SMALLEST_AGREEMENT, and differ on more than one sample.
    """
    found, expected = _both(path, module, given, inputs)
    difference = float(np.abs(found - expected).max())
    if not of_classes:
        return difference, None
    differing = int((found.argmax(1) != expected.argmax(1)).sum())
    agreement = 100 * (1 - differing / len(given))
    if agreement < SMALLEST_AGREEMENT and differing > 1:
        raise ExportError(
            f"{path.name} gives another class than its simulation in torch on {differing:,} of {len(given):,} samples, "
            f"where {SMALLEST_AGREEMENT}% of equal ones are expected: onnxruntime computes something else"
        )
    return difference, agreement


def _both(
    path: Path, module: nn.Module, given: NDArray[np.generic], inputs: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the file and what the module answer, float32 [n, ...]."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    with torch.no_grad():
        expected = module.cpu().eval()(inputs).numpy()
    sizes = [*BATCHES, len(given) - sum(BATCHES)]
    parts = np.split(given, np.cumsum(sizes)[:-1])
    return np.concatenate([session.run(None, {name: part})[0] for part in parts if len(part)]), expected
