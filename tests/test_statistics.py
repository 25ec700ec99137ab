import math
import random
import time
from fractions import Fraction

import numpy as np
import pytest

from kdedge.statistics import (
    mcnemar,
    mean_gain,
    mean_interval,
    paired_drop,
    quantile,
    quantile_interval,
    ratio_interval,
    wilson,
)


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (81, 263, 25.53, 36.62),  # Newcombe 1998, Table I, method 3
        (15, 148, 6.24, 16.05),
        (0, 20, 0.00, 16.11),
        (1, 29, 0.61, 17.18),
    ],
)
def test_wilson_gives_the_published_intervals(correct: int, n: int, low: float, high: float) -> None:
    assert wilson(correct, n) == (pytest.approx(low, abs=0.005), pytest.approx(high, abs=0.005))


def test_wilson_stays_within_0_and_100_percent() -> None:
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 100


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_count(correct: int, n: int) -> None:
    with pytest.raises(ValueError, match="expected 0 <= correct"):
        wilson(correct, n)


def answers(both: int, only_reference: int, only_candidate: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    cells = [(True, True)] * both + [(True, False)] * only_reference + [(False, True)] * only_candidate
    cells += [(False, False)] * neither
    reference, candidate = np.array(cells).T
    return reference, candidate


def test_paired_drop_is_walds_interval_of_a_table_with_half_an_image_more_in_each_cell() -> None:
    """Agresti, Categorical Data Analysis, table 10.1: of 1600, 794 approve twice, 150 first, 86 later, 570 never."""
    drop = paired_drop(*answers(794, 150, 86, 570))
    assert (drop.only_reference, drop.only_candidate, drop.n) == (150, 86, 1600)
    assert drop.points == pytest.approx(4.0)
    n, p12, p21 = 1602, 150.5 / 1602, 86.5 / 1602
    error = 1.959964 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / n)
    assert drop.lower_points == pytest.approx(100 * (p12 - p21 - error), rel=1e-6)
    assert drop.upper_points == pytest.approx(100 * (p12 - p21 + error), rel=1e-6)
    assert (round(drop.lower_points), round(drop.upper_points)) == (2, 6)  # published: (0.02, 0.06)


def test_paired_drop_of_equal_answers_is_zero_but_not_certain() -> None:
    drop = paired_drop(*answers(4500, 0, 0, 500))
    assert drop.points == 0 and 0 < drop.upper_points == -drop.lower_points < 0.05


def test_paired_drop_of_a_better_candidate_is_negative() -> None:
    assert paired_drop(*answers(50, 0, 50, 0)).upper_points < 0


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_paired_drop_refuses_what_cannot_be_paired(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="expected two equal"):
        paired_drop(np.ones(shapes[0], bool), np.ones(shapes[1], bool))


def exact_ranks(n: int, q: Fraction) -> tuple[int, int] | None:
    """The definition, in exact arithmetic: the innermost ranks with at most 1/40 on either side."""
    mass = [math.comb(n, k) * q**k * (1 - q) ** (n - k) for k in range(n + 1)]
    low = max((r for r in range(n + 1) if sum(mass[:r]) <= Fraction(1, 40)), default=0)
    high = min((r for r in range(n + 2) if sum(mass[r:]) <= Fraction(1, 40)), default=n + 1)
    return (low, high) if low >= 1 and high <= n else None


@pytest.mark.parametrize("n", [1, 5, 6, 7, 20, 35, 36, 101])
@pytest.mark.parametrize("percent", [50, 90, 99])
def test_quantile_interval_takes_the_exact_binomial_ranks(n: int, percent: int) -> None:
    ranks = range(1, n + 1)  # value = rank
    assert quantile_interval(ranks, percent / 100) == exact_ranks(n, Fraction(percent, 100))


def test_p99_has_an_interval_from_368_values_on() -> None:
    assert quantile_interval(range(1, 368), 0.99) is None
    assert quantile_interval(range(1, 369), 0.99) == exact_ranks(368, Fraction(99, 100))


def test_quantile_interval_of_many_values_agrees_with_the_normal_approximation() -> None:
    n, q = 1_000_000, 0.99
    low, high = quantile_interval(range(1, n + 1), q) or (0, 0)
    half = 1.96 * math.sqrt(n * q * (1 - q))
    assert low == pytest.approx(n * q - half, abs=3) and high == pytest.approx(n * q + half, abs=3)


def test_quantile_interval_holds_the_true_quantile_as_often_as_it_says() -> None:
    generator = random.Random(0)
    held = 0
    for _ in range(1000):
        low, high = quantile_interval(sorted(generator.random() for _ in range(200)), 0.9) or (0, 0)
        held += low <= 0.9 <= high
    assert 940 <= held <= 985


@pytest.mark.parametrize(("q", "value"), [(0.5, 5), (0.9, 9), (0.99, 10), (0.05, 1)])
def test_quantile_is_a_value_that_was_measured(q: float, value: int) -> None:
    assert quantile(range(1, 11), q) == value


def test_quantile_interval_of_nothing_is_none() -> None:
    assert quantile_interval([], 0.5) is None


def test_ratio_interval_gives_students_interval() -> None:
    """The sleep data of Student 1908: mean difference 1.58, 95% interval 0.7001142 to 2.4598858."""
    differences = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    mean, interval = ratio_interval([math.exp(difference) for difference in differences])
    assert interval is not None
    assert math.log(mean) == pytest.approx(1.58)
    assert [math.log(end) for end in interval] == pytest.approx([0.7001142, 2.4598858], abs=2e-4)


def test_ratio_interval_of_one_round_is_none() -> None:
    assert ratio_interval([2.0]) == (pytest.approx(2.0), None)


@pytest.mark.parametrize("rounds", [2, 5])
def test_ratio_interval_holds_the_true_ratio_as_often_as_it_says_even_for_few_rounds(rounds: int) -> None:
    generator = random.Random(1)
    held = 0
    for _ in range(2000):
        _, interval = ratio_interval([2 * math.exp(generator.gauss(0, 0.05)) for _ in range(rounds)])
        assert interval is not None
        held += interval[0] <= 2 <= interval[1]
    assert 1870 <= held <= 1930


def test_mean_interval_gives_students_interval() -> None:
    """Student's t, 2 degrees of freedom, 97.5%: 4.303 (Student 1908, and every table since)."""
    mean, interval = mean_interval([1.0, 2.0, 4.0])
    half = 4.303 * math.sqrt(7 / 3) / math.sqrt(3)
    assert mean == pytest.approx(7 / 3)
    assert interval == pytest.approx((7 / 3 - half, 7 / 3 + half))
    assert mean_interval([5.0]) == (5.0, None)


def test_mean_gain_is_as_sure_as_the_images_when_all_seeds_gain_the_same() -> None:
    """More seeds that get the very same images right tell nothing more of these images."""
    reference, candidate = answers(900, 20, 50, 30)
    drop = paired_drop(reference, candidate)
    gain, interval = mean_gain(np.array([candidate.astype(int) - reference] * 3))
    half = (drop.upper_points - drop.lower_points) / 2
    assert gain == pytest.approx(3.0)
    assert interval == pytest.approx((3 - half, 3 + half))


def test_mean_gain_averages_what_each_seed_gains_on_an_image() -> None:
    """One image gained in one seed, another one in the other: half a gain on each of them."""
    gains = np.array([[1] + 99 * [0], 99 * [0] + [1]])
    half = 196 * math.sqrt(2 * 0.5**2 + 1 - 1 / 102) / 102
    assert mean_gain(gains)[1] == pytest.approx((1 - half, 1 + half), rel=1e-4)


def test_mean_gain_is_as_sure_as_the_seeds_when_these_differ_more() -> None:
    gains = np.zeros((3, 1000), np.int8)
    for seed, gained in enumerate((100, 200, 400)):
        gains[seed, :gained] = 1
    assert mean_gain(gains) == mean_interval([10.0, 20.0, 40.0])
    assert mean_gain(gains[:1]) == (10.0, None)


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(1, 9, 2 * (1 + 10) / 2**10), (9, 1, 2 * (1 + 10) / 2**10), (0, 0, 1.0), (5, 5, 1.0), (0, 6, 2 / 2**6)],
)
def test_mcnemar_is_the_two_sided_sign_test(first: int, second: int, p: float) -> None:
    assert mcnemar(first, second) == p


def test_mcnemar_of_many_images() -> None:
    """Edwards' chi-square (1948) comes close for many: (|400 - 500| - 1)^2 / 900 = 10.89, p = 0.00097."""
    assert mcnemar(400, 500) == pytest.approx(0.00097, rel=0.02)


def test_mcnemar_of_all_test_images_takes_no_time() -> None:
    began = time.process_time()
    assert mcnemar(4900, 5100) == pytest.approx(
        0.04658552770494645, rel=1e-9
    )  # scipy.stats.binomtest(4900, 10000).pvalue
    assert time.process_time() - began < 1
