"""Fake quantization: values rounded to the grid of an integer type while they stay floats, and gradients that see through it.

The rounding has the gradient 1 where it does not clip and 0 where it does (straight-through, Bengio et al. 2013). Scale and
zero point are those of Jacob et al. 2018 ("Quantization and training of neural networks for efficient
integer-arithmetic-only inference"), Eq. 1: value = scale * (integer - zero point).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

LEVELS = 255  # of activations: uint8 runs from 0 to this
LIMITS = {8: 64, 4: 7, 2: 1}  # by bits, the largest integer of a weight; 64 takes 7 bits, exporters/int8.py says why
OUTER_BITS = 8  # of the weights of a network's first layer and of its head, whatever the others have
TERNARY_STEP = 1.4  # mean sizes of a channel's weights: below half of it, 0.7 of the mean, a weight is 0
AVERAGED_STEPS = 100  # which the moving average of a range remembers
SMALLEST_SCALE = 1e-6  # of activations that were 0 throughout


class ActivationQuantizer(nn.Module):
    """Rounds activations to 256 levels over the range that training shows it.

    The range is a moving average of the least and the greatest value of each batch (Jacob et al. 2018, section 3.1), taken
    over the first `observe_steps` steps; from then on it stays. It contains 0, which is a level: padding is exact, and
    what follows a ReLU has zero point 0. Until it was shown anything it lets values through as they are.
    """

    low: Tensor
    high: Tensor
    steps: Tensor

    def __init__(self, observe_steps: int) -> None:
        super().__init__()
        self.observe_steps = observe_steps
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale, float32, and zero point, a whole number in float32."""
        scale = ((self.high - self.low) / LEVELS).clamp(min=SMALLEST_SCALE)
        return scale, torch.round(-self.low / scale)

    def forward(self, values: Tensor) -> Tensor:
        """Float of any shape to the same shape, float32, on the grid."""
        if torch.onnx.is_in_onnx_export():
            return self._as_nodes(values)
        if self.training:
            self._observe(values.detach())
        elif not self.steps:
            return values
        on_grid: Tensor = _OnGrid.apply(values.float(), *self.grid())
        return on_grid

    def _observe(self, values: Tensor) -> None:
        low, high = torch.aminmax(values)
        rate = (1 / (self.steps + 1)).clamp(min=1 / AVERAGED_STEPS) * (self.steps < self.observe_steps)
        self.low.lerp_(low.float().clamp(max=0), rate)  # no branch: to look at `steps` would wait for the device
        self.high.lerp_(high.float().clamp(min=0), rate)
        self.steps += 1

    def _as_nodes(self, values: Tensor) -> Tensor:
        """The same as a QuantizeLinear and a DequantizeLinear, whose constants the exporter folds."""
        scale, zero_point = self.grid()
        constants = (scale, zero_point.to(torch.uint8))
        node, shape, version = torch.onnx.ops.symbolic, values.shape, 20
        integers = node("QuantizeLinear", (values, *constants), dtype=torch.uint8, shape=shape, version=version)
        return node("DequantizeLinear", (integers, *constants), dtype=torch.float32, shape=shape, version=version)


class _OnGrid(torch.autograd.Function):
    """Values on the grid of a uint8, with the gradient of those that were not clipped.

    torch's own `fake_quantize_per_tensor_affine` does the same but for ties, and on the CPU goes from value to value, which
    takes several times as long (docs/lab-notes.md).
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Float32 of any shape to the same shape; `scale` and `zero_point` are float32 scalars."""
        places = values / scale
        levels = places.round().add_(zero_point).clamp_(0, LEVELS)
        ctx.save_for_backward(places.add_(zero_point))
        return levels.sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Of the values alone: the grid does not learn."""
        (places,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(gradients[0], places, -0.5, LEVELS + 0.5), None, None


class WeightQuantizer(nn.Module):
    """Rounds weights to whole steps on each side of 0, those of each output channel to steps of their own.

    The largest lies at the last step. With 2 bits there is one step on each side, and most weights would be 0: there the
    step comes from the mean, with the threshold of ternary weight networks (Li and Liu 2016), and all beyond it is at the
    step. The gradient is that of the rounded weight everywhere (as in the code of Polino et al. 2018): if it
    stopped beyond the step, a weight that got there would stay there.

    With a grid a channel, folding a batch norm multiplies the grid by the same number as the weights: it makes no difference
    whether weights are rounded before or after. So batch norm stays what it is in training (Jacob et al. 2018, section
    3.2, fold it there) and is folded in export.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.limit = LIMITS[bits]

    def forward(self, weight: Tensor) -> Tensor:
        """Float [outputs, ...] to the same shape, each channel on its grid."""
        plain = weight.detach()
        sizes = plain.abs().flatten(1)
        step = TERNARY_STEP * sizes.mean(1) if self.limit == 1 else sizes.amax(1) / self.limit
        scale = step.clamp(min=torch.finfo(torch.float32).tiny).view(-1, *[1] * (weight.ndim - 1))
        rounded = (plain / scale).round_().clamp_(-self.limit, self.limit).mul_(scale)
        return rounded + (weight - plain)  # the second term is 0 and has the gradient
