"""Fake quantization against its formulas in numpy and float64, its gradients, and how long it observes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kdedge.quantize.fake import AVERAGED_STEPS, LIMITS, ActivationQuantizer, WeightQuantizer

RANDOM = np.random.default_rng(0)


def on_grid(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Jacob et al. 2018, Eqs. 1 and 12, and section 3: 256 levels from `low` to `high`, one of them 0."""
    scale = (high - low) / 255
    zero_point = np.round(-low / scale)
    return scale * (np.clip(np.round(values / scale) + zero_point, 0, 255) - zero_point)


def observed(low: float, high: float) -> ActivationQuantizer:
    """One that was shown this range, and rounds in eval mode."""
    quantizer = ActivationQuantizer(1)
    quantizer(torch.tensor([low, high]))
    return quantizer.eval()


def gradient(of: Callable[[Tensor], Tensor], values: np.ndarray) -> np.ndarray:
    """Of the sum of the outputs, each times 2."""
    given = torch.from_numpy(values.astype(np.float32)).requires_grad_()
    (2 * of(given)).sum().backward()  # type: ignore[no-untyped-call]
    assert given.grad is not None
    return given.grad.numpy()


@pytest.mark.parametrize(("low", "high"), [(0, 3), (-1, 2), (-2.5, 0)])
def test_activations_lie_on_256_levels_of_their_range(low: float, high: float) -> None:
    values = RANDOM.uniform(low - 0.5, high + 0.5, (40, 3, 5))
    found = observed(low, high)(torch.from_numpy(values).float()).double().numpy()
    expected = on_grid(values, low, high)
    step = (high - low) / 255
    assert np.abs(found - expected).max() < 1.01 * step  # a float32 between two levels may go to either
    assert (np.abs(found - expected) < 1e-5).mean() > 0.99
    assert found.min() < 0.02 + low and found.max() > high - 0.02


def test_a_known_case_by_hand() -> None:
    """From -1 to 254 the scale is 1 and the zero point 1; halves go to the even integer."""
    given = torch.tensor([-7, -1, -0.6, 0, 0.5, 1.5, 2.4, 253.7, 300])
    assert observed(-1, 254)(given).tolist() == [-1, -1, -1, 0, 0, 2, 2, 254, 254]


def test_zero_is_a_level_and_after_a_relu_it_is_the_first() -> None:
    scale, zero_point = observed(0.3, 2).grid()  # nothing negative was seen
    assert zero_point == 0 and scale.item() == pytest.approx(2 / 255)
    assert observed(-0.7, 2)(torch.zeros(3)).tolist() == [0, 0, 0]


def test_the_gradient_goes_straight_through_and_stops_where_values_are_clipped() -> None:
    values = RANDOM.uniform(-2, 3, (50, 4))
    integers = np.round(values * 85) + 85  # 255 levels over a range of 3, of which 85 lie below 0
    expected = np.where((integers >= 0) & (integers <= 255), 2.0, 0.0)
    assert np.array_equal(gradient(observed(-1, 2), values), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", [(6, 5), (6, 3, 3, 3)])
def test_weights_lie_on_a_grid_of_their_own_channel(shape: tuple[int, ...], bits: int) -> None:
    weight = RANDOM.normal(size=shape) * np.arange(1, 7).reshape(6, *[1] * (len(shape) - 1))
    limit = LIMITS[bits]
    scale = np.abs(weight).reshape(6, -1).max(1).reshape(6, *[1] * (len(shape) - 1)) / limit
    expected = scale * np.round(weight / scale)
    found = WeightQuantizer(bits)(torch.from_numpy(weight).float()).double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(np.unique(np.round(found[0] / scale[0]))) <= 2 * limit + 1


def test_weights_of_two_bits_are_ternary() -> None:
    """Li and Liu 2016: 0 where a weight is smaller than 0.7 of the mean size of its channel, else of one size."""
    weight = RANDOM.normal(size=(5, 3, 3, 3)) * np.arange(1, 6).reshape(5, 1, 1, 1)
    mean = np.abs(weight).mean((1, 2, 3), keepdims=True)
    expected = 1.4 * mean * np.sign(weight) * (np.abs(weight) > 0.7 * mean)
    found = WeightQuantizer(2)(torch.from_numpy(weight).float()).double().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    by_hand = WeightQuantizer(2)(torch.tensor([[4.0, -1.1, 0.5, -0.4], [1.0, -1.0, 1.0, 1.0]]))  # means 1.5 and 1
    torch.testing.assert_close(by_hand, torch.tensor([[2.1, -2.1, 0.0, 0.0], [1.4, -1.4, 1.4, 1.4]]))


def test_eight_bits_are_the_seven_that_every_cpu_adds_without_saturating() -> None:
    assert 2 * LIMITS[8] * 255 < 2**15 <= 2 * (LIMITS[8] + 1) * 255


@pytest.mark.parametrize("bits", LIMITS)
def test_a_weight_has_the_gradient_of_its_rounded_one(bits: int) -> None:
    weight = np.append(RANDOM.normal(size=(4, 7)), [[9.0]] * 4, axis=1)  # of 2 bits, the last is far beyond the step
    assert np.array_equal(gradient(WeightQuantizer(bits), weight), np.full((4, 8), 2.0))


@pytest.mark.parametrize("bits", LIMITS)
def test_a_channel_of_zeros_stays_zero(bits: int) -> None:
    assert WeightQuantizer(bits)(torch.zeros(3, 4)).tolist() == [[0.0] * 4] * 3


def test_the_range_is_a_mean_that_becomes_a_moving_average() -> None:
    quantizer = ActivationQuantizer(10_000)
    batches = RANDOM.normal(size=(3 * AVERAGED_STEPS, 20))
    low = high = 0.0
    for step, batch in enumerate(batches):
        quantizer(torch.from_numpy(batch).float())
        rate = max(1 / (step + 1), 1 / AVERAGED_STEPS)
        low, high = low + rate * (min(batch.min(), 0) - low), high + rate * (max(batch.max(), 0) - high)
        if step == 9:
            assert quantizer.high.item() == pytest.approx(np.maximum(batches[:10].max(1), 0).mean(), rel=1e-5)
    assert (quantizer.low.item(), quantizer.high.item()) == pytest.approx((low, high), rel=1e-4)


def test_the_range_stays_after_the_steps_that_observe_it_and_in_eval_mode() -> None:
    quantizer = ActivationQuantizer(2)
    for scale in (1, 3):
        quantizer(scale * torch.tensor([-1.0, 1.0]))
    for training in (True, False):
        assert quantizer.train(training)(torch.tensor([100.0])).item() == pytest.approx(2, rel=0.01)
    assert (quantizer.low.item(), quantizer.high.item()) == (-2, 2)


def test_what_has_observed_nothing_changes_nothing_in_eval_mode() -> None:
    values = torch.randn(20)
    assert torch.equal(ActivationQuantizer(5).eval()(values), values)
