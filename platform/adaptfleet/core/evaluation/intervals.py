"""How sure a metric is, and how sure the difference of two: bootstrap and permutation over rows. Shapes: N rows, R resamples.

A metric here is a ratio of sums over rows. A mean is one (every denominator 1), micro-averaged F1 is one (2 common / pairs), and so is
perplexity (nats over labels, then the exponential). Resampling draws rows, so each of these keeps its own form.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
_MAX_DRAWS = 2_000_000
"""Drawn at once; more are drawn in parts, so that memory does not grow with the number of resamples."""


@dataclass(frozen=True)
class Ratio:
    """sum(numerator) / sum(denominator) over the rows; rows on which the metric is not defined have 0 in both."""

    numerator_N: Array
    denominator_N: Array
    exponential: bool = False
    """The metric is the exponential of the ratio."""

    @property
    def num_rows(self) -> int:
        """Rows on which the metric is defined."""
        return int(np.count_nonzero(self.denominator_N))

    def value(self) -> float:
        return float(self.of(self.numerator_N.sum(), self.denominator_N.sum()))

    def of(self, numerator_R: Array, denominator_R: Array) -> Array:
        """The metric of given sums; NaN where no row defines it."""
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            ratio_R = np.where(denominator_R > 0, numerator_R / denominator_R, np.nan)
            return np.exp(np.minimum(ratio_R, 700.0)) if self.exponential else ratio_R


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """The second less the first."""

    value: float
    low: float
    high: float
    p_value: float


def confidence_interval(metric: Ratio, num_resamples: int, seed: int = 0) -> Interval:
    """The 95% interval by the percentile bootstrap, Efron 1979. ValueError if no row defines the metric."""
    if not metric.num_rows:
        raise ValueError("no row defines the metric.")
    drawn_R = np.concatenate([_resampled(metric, rows_RN) for rows_RN in _draws(len(metric.numerator_N), num_resamples, seed)])
    low, high = np.nanquantile(drawn_R, (0.025, 0.975))
    return Interval(metric.value(), float(low), float(high))


def paired_difference(first: Ratio, second: Ratio, num_resamples: int, seed: int = 0) -> Difference:
    """Of two subjects on the same rows: the 95% interval by the paired bootstrap (the same drawn rows for both), and the two-sided p-value
    by the paired permutation test (each row's two outcomes exchanged or not; for a mean: signs of differences flipped), Fisher 1935.

    ValueError if the rows are not as many, or none defines the metric.
    """
    if len(first.numerator_N) != len(second.numerator_N) or not first.num_rows or not second.num_rows:
        raise ValueError("the two are not measured on the same rows.")
    drawn_R = np.concatenate(
        [_resampled(second, rows_RN) - _resampled(first, rows_RN) for rows_RN in _draws(len(first.numerator_N), num_resamples, seed)]
    )
    low, high = np.nanquantile(drawn_R, (0.025, 0.975))
    return Difference(second.value() - first.value(), float(low), float(high), _p_value(first, second, num_resamples, seed))


def _resampled(metric: Ratio, rows_RN: npt.NDArray[np.int64]) -> Array:
    return metric.of(metric.numerator_N[rows_RN].sum(axis=1), metric.denominator_N[rows_RN].sum(axis=1))


def _p_value(first: Ratio, second: Ratio, num_permutations: int, seed: int) -> float:
    """Share of exchanges with a difference at least as large; the observed one counts as one of them, Phipson & Smyth 2010."""
    observed = abs(second.value() - first.value())
    over_N, under_N = second.numerator_N - first.numerator_N, second.denominator_N - first.denominator_N
    generator = np.random.default_rng((seed, 1))
    num_as_large = 0
    for count in _parts(num_permutations, len(over_N)):
        exchanged_RN = generator.integers(0, 2, size=(count, len(over_N))).astype(np.float64)
        over_R, under_R = exchanged_RN @ over_N, exchanged_RN @ under_N
        first_R = first.of(first.numerator_N.sum() + over_R, first.denominator_N.sum() + under_R)
        second_R = second.of(second.numerator_N.sum() - over_R, second.denominator_N.sum() - under_R)
        # Sums in another order differ in the last digits: a tie must stay a tie.
        num_as_large += int(np.count_nonzero(np.abs(second_R - first_R) >= observed * (1 - 1e-9) - 1e-12))
    return (num_as_large + 1) / (num_permutations + 1)


def _draws(num_rows: int, num_resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Row numbers drawn with replacement, in parts of the resamples."""
    generator = np.random.default_rng((seed, 0))
    for count in _parts(num_resamples, num_rows):
        yield generator.integers(0, num_rows, size=(count, num_rows))


def _parts(total: int, width: int) -> Iterator[int]:
    size = max(1, _MAX_DRAWS // width)
    for begin in range(0, total, size):
        yield min(size, total - begin)
