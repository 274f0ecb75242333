"""Intervals and p-values against what can be worked out: exact tests, normal theory, coverage."""

import itertools
import math

import numpy as np
import pytest

from adaptfleet.core.evaluation.intervals import Ratio, confidence_interval, paired_difference


def mean_of(values: list[float] | np.ndarray) -> Ratio:
    return Ratio(np.asarray(values, dtype=np.float64), np.ones(len(values)))


def test_the_interval_of_a_share_is_the_binomials() -> None:
    hits = np.zeros(200)
    hits[:120] = 1.0
    found = confidence_interval(mean_of(hits), 20_000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    # the bootstrap of a share moves in steps of 1/200
    assert found.value == 0.6 and found.low == pytest.approx(0.6 - half, abs=0.008) and found.high == pytest.approx(0.6 + half, abs=0.008)


def test_a_constant_has_no_spread_and_the_seed_repeats() -> None:
    same = confidence_interval(mean_of([0.25] * 30), 500)
    assert (same.low, same.high) == (0.25, 0.25)
    values = np.random.default_rng(0).normal(size=50)
    assert confidence_interval(mean_of(values), 500, seed=3) == confidence_interval(mean_of(values), 500, seed=3)
    assert confidence_interval(mean_of(values), 500, seed=3) != confidence_interval(mean_of(values), 500, seed=4)


def test_the_intervals_cover_the_truth_nearly_as_often_as_they_say() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for i in range(300):
        found = confidence_interval(mean_of((generator.random(80) < 0.3).astype(float)), 400, seed=i)
        covered += found.low <= 0.3 <= found.high
    # 95% less what a percentile bootstrap of 80 rows is known to lose, plus and minus three standard errors of 300 trials
    assert 0.89 <= covered / 300 <= 0.985


def test_a_ratio_is_of_sums_and_perplexity_its_exponential() -> None:
    ratio = Ratio(np.array([2.0, 0.0, 4.0]), np.array([4.0, 0.0, 4.0]))
    assert ratio.value() == 6 / 8 and ratio.num_rows == 2
    assert Ratio(np.array([3.0, 5.0]), np.array([2.0, 6.0]), exponential=True).value() == pytest.approx(math.e)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_p_value_is_the_exact_permutation_tests(seed: int) -> None:
    generator = np.random.default_rng(seed)
    first, second = generator.normal(size=10), generator.normal(loc=0.6, size=10)
    differences = second - first
    signs = np.array(list(itertools.product((1, -1), repeat=10)))
    exact = float(np.mean(np.abs(signs @ differences) >= abs(differences.sum()) - 1e-9))
    found = paired_difference(mean_of(first), mean_of(second), 20_000)
    # three standard errors of 20,000 permutations
    assert found.p_value == pytest.approx(exact, abs=3 * math.sqrt(exact * (1 - exact) / 20_000) + 1e-4)
    assert found.value == pytest.approx(differences.mean())


def test_subjects_that_agree_have_p_1_and_a_clear_difference_a_small_one() -> None:
    values = [0.0, 1.0] * 20
    same = paired_difference(mean_of(values), mean_of(values), 1000)
    assert (same.value, same.low, same.high, same.p_value) == (0.0, 0.0, 0.0, 1.0)
    clear = paired_difference(mean_of([0.0] * 40), mean_of([1.0] * 30 + [0.0] * 10), 1000)
    assert clear.p_value == pytest.approx(1 / 1001) and clear.low > 0.5


def test_pairing_counts() -> None:
    """Rows differ much, subjects little and always alike: unpaired intervals would hide it."""
    rows = np.random.default_rng(2).normal(scale=10.0, size=60)
    found = paired_difference(mean_of(rows), mean_of(rows + 0.1), 2000)
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1) and found.p_value < 0.01


def test_a_metric_that_no_row_defines_is_refused() -> None:
    nothing = Ratio(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="no row defines"):
        confidence_interval(nothing, 100)
    with pytest.raises(ValueError, match="same rows"):
        paired_difference(mean_of([1.0]), mean_of([1.0, 2.0]), 100)
