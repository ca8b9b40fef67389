"""The ratio of two settings with its confidence interval, from interleaved repeats.

A run of a setting gives one value: the median over its counted windows, so that a few slow steps do not count. A round
is one run of each setting, one after the other. The ratio of the two values of a round is a pair; what slowed the
machine in that round cancels out. With the logarithms of the pairs, d_1 ... d_n:

    estimate   the median of all (d_i + d_j) / 2 with i <= j (Hodges and Lehmann, Ann. Math. Statist. 34, 1963): close
               to the mean for normal noise, and robust against one outlier in four rounds
    interval   estimate +- t * s / sqrt(n)

s is the standard deviation of the pairs (with n - 1), and t is Student's quantile for n - 1 degrees of freedom. At the
end, logarithms are turned back into ratios. For normal noise, the interval contains the true ratio in 94.4 to 95.4 % of
cases with 3 to 15 pairs. If one run in ten is disturbed, it does in up to 98.7 %: outliers widen s more than they shift
the estimate.

Why not a bootstrap: n pairs drawn from n never reach beyond the outermost ones, so the percentile interval of 5 pairs
contains the true ratio in 87 % of cases. The bootstrap's standard error with Student's quantile contains it in 96 to
97 %, with intervals that are a tenth to a quarter wider. Why steps are not resampled within a run: their noise is
already in the scatter of the pairs and would count twice (Davison and Hinkley, Bootstrap Methods and their Application,
1997, section 3.8). tests/unit/analysis/compare/test_compare_coverage.py measures these percentages.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FEWEST_PAIRS = 3
CONFIDENCE = 0.95
MAX_LOGARITHM = 700.0  # exp of more overflows float64

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two settings, with its interval at level `confidence`; the interval is None with too few pairs."""

    ratio: float
    interval: tuple[float, float] | None
    confidence: float
    pairs: int

    @property
    def is_significant(self) -> bool:
        return self.interval is not None and not self.interval[0] <= 1.0 <= self.interval[1]


def median(values: Sequence[float]) -> float:
    return float(np.median(values))


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third quartile."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(low), float(high)


def paired_ratio(values: Sequence[float], reference: Sequence[float], comparisons: int = 1) -> Ratio:
    """The ratio of `values` to `reference`, by pairs. All values must be above 0.

    `comparisons`: number of intervals that are read together. Each is widened (Bonferroni), so that all of them hold at
    once with CONFIDENCE; `confidence` of the result is the level of the single interval.
    """
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    logs = np.sort(np.log(np.asarray(values, dtype=np.float64)) - np.log(np.asarray(reference, dtype=np.float64)))
    if len(logs) < FEWEST_PAIRS:
        return Ratio(_exp(float(hodges_lehmann(logs))), None, confidence, len(logs))
    estimate, half_width = (float(each) for each in estimate_and_half_width(logs, confidence))
    return Ratio(_exp(estimate), (_exp(estimate - half_width), _exp(estimate + half_width)), confidence, len(logs))


def estimate_and_half_width(logs: Values, confidence: float) -> tuple[Values, Values]:
    """The estimate from logarithms of pairs (..., n), and half the width of its interval: (...) each."""
    return hodges_lehmann(logs), student_quantile(confidence, logs.shape[-1] - 1) * standard_error(logs)


def _exp(logarithm: float) -> float:
    return math.exp(max(min(logarithm, MAX_LOGARITHM), -MAX_LOGARITHM))


def hodges_lehmann(values: Values) -> Values:
    """The median of the means of all pairs of values, each with itself included: (..., n) -> (...)."""
    first, second = np.triu_indices(values.shape[-1])
    return np.asarray(np.median((values[..., first] + values[..., second]) / 2, axis=-1))


def standard_error(values: Values) -> Values:
    """Standard error of the mean: values (..., n), n >= 2 -> (...). The standard deviation is with n - 1."""
    return np.asarray(values.std(axis=-1, ddof=1) / math.sqrt(values.shape[-1]))


@functools.cache
def student_quantile(confidence: float, freedom: int) -> float:
    """The t with P(|T| <= t) = `confidence` for Student's distribution, by bisection."""
    low, high = 0.0, 1.0
    while student_within(high, freedom) < confidence:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_within(middle, freedom) < confidence else (low, middle)
    return high


def student_within(t: float, freedom: int) -> float:
    """P(|T| <= t) for an integer number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for number in range(1 + odd, freedom, 2):  # one term per power 1, 3, ... or 0, 2, ... below freedom - 1
        total += term
        term *= cosine * cosine * number / (number + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
