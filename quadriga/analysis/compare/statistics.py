"""How much faster one setting is than another, and how sure that is, from repeats that took turns.

One run of a setting gives one figure: the median over its counted windows of steps, so that a few disturbed steps do
not count. A round is one run of each setting, one after the other; the ratio of the two figures of a round is a pair,
in which whatever slowed the machine in that round cancels out. Of the pairs' logarithms d_1 ... d_n

    estimate   the median of all (d_i + d_j) / 2 with i <= j (Hodges and Lehmann, Ann. Math. Statist. 34, 1963): close
               to the mean where noise is normal, and not carried away by one bad round in four
    interval   estimate +- t * s / sqrt(n)

where s is the standard deviation of the pairs (with n - 1) and t is Student's quantile for n - 1 degrees of freedom.
All is turned back from logarithms to ratios at the end. Where noise is normal, the interval holds the truth in 94.4 to
95.4 % of cases for 3 to 15 pairs; where one run in ten is disturbed, in up to 98.7 %: bad rounds widen s more than they
move the estimate.

Why no bootstrap: n pairs drawn from n never reach beyond the outermost ones, so the percentile interval of 5 pairs
holds the truth in 87 of 100 cases; and the standard error of the bootstrap with Student's quantile holds it in 96 to
97 %, with intervals that are a tenth to a quarter wider. Why steps are not drawn anew inside each run: their noise is
in the scatter of the pairs already and would count twice (Davison and Hinkley, Bootstrap Methods and their Application,
1997, section 3.8). tests/unit/analysis/compare/test_compare_coverage.py measures what stands here.
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
MAX_LOGARITHM = 700.0  # of a logarithm: exp of more is beyond float64

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ratio:
    """Ours over the other's, with the interval that holds the true ratio with `confidence`; None of too few pairs."""

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
    """The lower and the upper quartile."""
    low, high = np.quantile(values, (0.25, 0.75))
    return float(low), float(high)


def paired_ratio(ours: Sequence[float], others: Sequence[float], comparisons: int = 1) -> Ratio:
    """Ours over the others', by pairs; all values above 0.

    `comparisons`: how many such intervals are read together. Each is widened so that all of them hold at once with
    CONFIDENCE (Bonferroni); `confidence` is what the single one then has.
    """
    confidence = 1 - (1 - CONFIDENCE) / comparisons
    logs = np.sort(np.log(np.asarray(ours, dtype=np.float64)) - np.log(np.asarray(others, dtype=np.float64)))
    if len(logs) < FEWEST_PAIRS:
        return Ratio(_exp(float(hodges_lehmann(logs))), None, confidence, len(logs))
    estimate, half_width = (float(each) for each in estimate_and_half_width(logs, confidence))
    return Ratio(_exp(estimate), (_exp(estimate - half_width), _exp(estimate + half_width)), confidence, len(logs))


def estimate_and_half_width(logs: Values, confidence: float) -> tuple[Values, Values]:
    """The estimate from pairs' logarithms (..., n), and how far its interval reaches to both sides: (...) each."""
    return hodges_lehmann(logs), student_quantile(confidence, logs.shape[-1] - 1) * standard_error(logs)


def _exp(logarithm: float) -> float:
    return math.exp(max(min(logarithm, MAX_LOGARITHM), -MAX_LOGARITHM))


def hodges_lehmann(values: Values) -> Values:
    """The median of the means of all pairs, each value with itself included. (..., n) -> (...)."""
    first, second = np.triu_indices(values.shape[-1])
    return np.asarray(np.median((values[..., first] + values[..., second]) / 2, axis=-1))


def standard_error(values: Values) -> Values:
    """Of the mean of values (..., n), n of at least 2, from their standard deviation with n - 1: (...)."""
    return np.asarray(values.std(axis=-1, ddof=1) / math.sqrt(values.shape[-1]))


@functools.cache
def student_quantile(confidence: float, freedom: int) -> float:
    """The t that a Student variable stays within, to both sides, with probability `confidence`, found by bisection."""
    low, high = 0.0, 1.0
    while student_within(high, freedom) < confidence:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_within(middle, freedom) < confidence else (low, middle)
    return high


def student_within(t: float, freedom: int) -> float:
    """P(|T| <= t) for a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0
    for number in range(1 + odd, freedom, 2):  # one term for each of the powers 1, 3, ... or 0, 2, ... below freedom-1
        total += term
        term *= cosine * cosine * number / (number + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
