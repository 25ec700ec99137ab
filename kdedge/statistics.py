"""Intervals: how sure the measured numbers are. All are two-sided, 95%."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054

# 97.5% quantiles of Student's t for 1, 2, ... 30 degrees of freedom; the last one stands for more of them.
_T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228]
_T95 += [2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086]
_T95 += [2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042]


FEWEST_ROUNDS = 3  # that tell equal speeds from unknown ones: half an interval of two is 13 of their standard errors


@dataclass(frozen=True)
class Drop:
    """By how many percentage points a candidate is worse than a reference on the same n images."""

    points: float  # the drop that was seen; negative when the candidate is better
    lower_points: float
    upper_points: float  # what a gate compares: as a one-sided bound it holds with 97.5%
    only_reference: int  # images that only the reference gets right
    only_candidate: int
    n: int


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Interval of an accuracy, in percent, from `correct` of `n` > 0 images (Wilson 1927)."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"expected 0 <= correct <= n and n > 0, got {correct} of {n}")
    share, z2 = correct / n, Z95 * Z95
    centre = share + z2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low, high = (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)
    return 100 * max(0.0, low), 100 * min(1.0, high)


def paired_drop(reference_correct: NDArray[np.bool_], candidate_correct: NDArray[np.bool_]) -> Drop:
    """Drop in accuracy from two boolean [n] arrays over the same images.

    Interval of Agresti and Min 2005 (Statistics in Medicine 24:729): Wald's for matched pairs after adding 0.5 to each
    of the four cells, so that it does not collapse when the two hardly ever disagree.
    """
    if reference_correct.shape != candidate_correct.shape or reference_correct.ndim != 1 or not reference_correct.size:
        raise ValueError(f"expected two equal [n], got {reference_correct.shape} and {candidate_correct.shape}")
    n = reference_correct.size
    lost = int(np.count_nonzero(reference_correct & ~candidate_correct))
    won = int(np.count_nonzero(candidate_correct & ~reference_correct))
    centre, half = (lost - won) / (n + 2), _paired_half(lost - won, lost + won, n)
    points = 100 * (lost - won) / n
    return Drop(points, 100 * (centre - half), 100 * (centre + half), lost, won, n)


def _paired_half(total: float, squares: float, n: int) -> float:
    """Half the width of `paired_drop`'s interval, as a share, from the sum and the sum of squares of n differences."""
    return Z95 * math.sqrt(squares + 1 - total**2 / (n + 2)) / (n + 2)


def mean_gain(gains: NDArray[np.integer[Any]]) -> tuple[float, tuple[float, float] | None]:
    """Gain in accuracy in percentage points over seeds, and its interval; None for one seed.

    `gains` is [seeds, n]: 1 where only the candidate gets an image right, -1 where only the reference does, else 0. Seeds
    differ by chance, and so would other test images, which are the same for all seeds. Few seeds can agree by luck, and
    Student's interval is then as narrow as if there were no other images; so the wider one counts of `mean_interval` over
    seeds and of that of `paired_drop` over images, each with its mean over seeds.
    """
    points, interval = mean_interval([100 * float(seed.mean()) for seed in gains])
    if interval is None:
        return points, None
    image = gains.mean(axis=0)
    half = 100 * _paired_half(float(image.sum()), float((image**2).sum()), len(image))
    return points, (min(interval[0], points - half), max(interval[1], points + half))


def quantile(sorted_values: Sequence[float], q: float) -> float:
    """The q-quantile, 0 < q < 1: the smallest value that at least a share q of the values does not exceed."""
    return sorted_values[max(0, math.ceil(q * len(sorted_values)) - 1)]


def quantile_interval(sorted_values: Sequence[float], q: float) -> tuple[float, float] | None:
    """Interval of the q-quantile, from two of the sorted values, whatever their distribution.

    The ranks are those of the binomial distribution of how many of n independent values lie below the quantile. None
    when n is too small for both to exist: p50 needs 6 values, p90 36 and p99 368.
    """
    n = len(sorted_values)
    ranks = _binomial_ranks(n, q) if n else None
    return None if ranks is None else (sorted_values[ranks[0] - 1], sorted_values[ranks[1] - 1])


def _binomial_ranks(n: int, q: float) -> tuple[int, int] | None:
    """Largest l and smallest u in 1..n with P(B < l) <= 0.025 and P(B >= u) <= 0.025, for B ~ Binomial(n, q)."""
    deviation = math.sqrt(n * q * (1 - q))
    k = max(0, math.floor(n * q - 8 * deviation - 10))  # less than 1e-12 lies below
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    mass = math.exp(log_choose + k * math.log(q) + (n - k) * math.log1p(-q))
    below, low = 0.0, k  # below: P(B < k)
    while k < n:
        if below <= 0.025:
            low = k
        below, mass, k = below + mass, mass * (n - k) / (k + 1) * q / (1 - q), k + 1
        if below >= 0.975:
            return (low, k) if low >= 1 else None
    return None


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of independent values, and its interval by Student's t; None for one value.

    A bootstrap over two to five values covers far less than it claims (half, for two); t knows that they are few.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None
    half = _T95[min(len(values) - 1, len(_T95)) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, (mean - half, mean + half)


def ratio_interval(ratios: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Geometric mean of one ratio a round, and its interval: `mean_interval` of the logarithms."""
    mean, interval = mean_interval([math.log(ratio) for ratio in ratios])
    return math.exp(mean), interval and (math.exp(interval[0]), math.exp(interval[1]))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value that two classifiers are equally often right (McNemar 1947, by the binomial distribution).

    The arguments count the images that only the first, and only the second, gets right.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    choices, tail = math.comb(n, fewer), 0
    for k in range(fewer, -1, -1):
        tail += choices
        choices = choices * k // (n - k + 1)  # from n over k to n over k - 1
    return min(1.0, 2 * tail / int(2**n))
