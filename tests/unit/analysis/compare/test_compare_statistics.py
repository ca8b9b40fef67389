"""The paired ratio and its interval: known values, and what must hold for any pairs."""

from __future__ import annotations

import math
from itertools import combinations_with_replacement
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.analysis.compare.statistics import (
    CONFIDENCE,
    hodges_lehmann,
    middle_half,
    paired_ratio,
    student_quantile,
    student_within,
)

few = settings(max_examples=25)
seconds = st.floats(1e-3, 1e3)
pairs = st.lists(st.tuples(seconds, seconds), min_size=3, max_size=8)


@pytest.mark.parametrize(
    ("confidence", "freedom", "quantile"),  # Fisher and Yates, Statistical Tables, table III
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 9, 2.262),
        (0.98, 4, 3.747),
        (0.99, 2, 9.925),
        (0.99, 30, 2.750),
    ],
)
def test_students_quantile_is_that_of_the_tables(confidence, freedom, quantile):
    assert student_quantile(confidence, freedom) == pytest.approx(quantile, abs=5e-4)


@given(st.integers(1, 60), st.floats(0.5, 0.999))
def test_students_quantile_is_the_inverse_of_the_probability(freedom, confidence):
    assert student_within(student_quantile(confidence, freedom), freedom) == pytest.approx(confidence, abs=1e-7)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=9))
def test_the_estimate_is_the_median_of_all_means_of_two(values):
    by_hand = median((a + b) / 2 for a, b in combinations_with_replacement(values, 2))
    assert hodges_lehmann(np.array(values)) == pytest.approx(by_hand, abs=1e-12)


def test_one_bad_round_of_five_does_not_carry_the_estimate_away():
    calm = paired_ratio([1.04, 1.05, 1.05, 1.05, 1.06], [1.0] * 5)
    disturbed = paired_ratio([1.04, 1.05, 1.05, 1.05, 3.0], [1.0] * 5)
    assert calm.ratio == pytest.approx(1.05)
    assert disturbed.ratio == pytest.approx(1.05, abs=0.006)
    assert calm.is_significant
    assert not disturbed.is_significant  # but with such a round among them, five are not enough


@pytest.mark.parametrize(
    ("logs", "estimate", "deviation", "quantile"),  # quantiles of the tables, for n - 1
    [
        ([0.01, 0.03, 0.02], 0.02, 0.01, 4.302653),
        ([0.0, 0.1, 0.0, 0.1], 0.05, math.sqrt(0.01 / 3), 3.182446),
        ([0.02, -0.02, 0.01, -0.01, 0.0], 0.0, math.sqrt(0.001 / 4), 2.776445),
    ],
    ids=["3 pairs", "4 pairs", "5 pairs"],
)
def test_the_interval_is_students_for_n_less_1(logs, estimate, deviation, quantile):
    found = paired_ratio(list(np.exp(logs)), [1.0] * len(logs))
    reach = quantile * deviation / math.sqrt(len(logs))
    assert found.ratio == pytest.approx(math.exp(estimate))
    assert found.interval == pytest.approx((math.exp(estimate - reach), math.exp(estimate + reach)), rel=1e-6)


def test_ratios_beyond_all_numbers_stay_finite():
    found = paired_ratio([1e-100, 1e100, 1e-100], [1e100, 1e-100, 1e100])
    assert all(0 < each < math.inf for each in (found.ratio, *found.interval))


def test_fewer_than_three_pairs_have_no_interval():
    for count in (1, 2):
        found = paired_ratio([2.0] * count, [1.0] * count)
        assert (found.ratio, found.interval, found.pairs) == (pytest.approx(2.0), None, count)
        assert not found.is_significant


def test_pairs_without_scatter_have_an_interval_without_width():
    equal = paired_ratio([3.0, 3.0, 3.0], [3.0, 3.0, 3.0])
    assert equal.interval == (1.0, 1.0)
    assert not equal.is_significant
    assert paired_ratio([3.0, 3.0, 3.0], [2.0, 2.0, 2.0]).is_significant


def test_what_slows_a_whole_round_cancels_out():
    slow = np.array([1.0, 1.7, 0.9, 2.6, 1.2])
    found = paired_ratio(list(1.05 * slow), list(slow))
    assert found.ratio == pytest.approx(1.05)
    assert found.is_significant


@few
@given(pairs)
def test_the_ratio_lies_in_its_interval_which_is_as_wide_to_both_sides(drawn):
    found = paired_ratio(*zip(*drawn, strict=True))
    low, high = found.interval
    assert low <= found.ratio * (1 + 1e-12)
    assert found.ratio <= high * (1 + 1e-12)
    assert math.log(high) + math.log(low) == pytest.approx(2 * math.log(found.ratio), abs=1e-6)


@few
@given(pairs, st.floats(0.01, 100))
def test_units_do_not_matter_and_a_factor_moves_all_by_itself(drawn, factor):
    ours, others = zip(*drawn, strict=True)
    plain = paired_ratio(ours, others)
    units = paired_ratio([factor * each for each in ours], [factor * each for each in others])
    moved = paired_ratio([factor * each for each in ours], others)
    assert [units.ratio, *units.interval] == pytest.approx([plain.ratio, *plain.interval], rel=1e-6)
    assert [moved.ratio, *moved.interval] == pytest.approx(
        [factor * each for each in (plain.ratio, *plain.interval)], rel=1e-6
    )


@few
@given(pairs, st.randoms())
def test_the_order_of_the_rounds_does_not_matter(drawn, random):
    shuffled = list(drawn)
    random.shuffle(shuffled)
    assert paired_ratio(*zip(*drawn, strict=True)) == paired_ratio(*zip(*shuffled, strict=True))


@few
@given(pairs)
def test_the_other_way_round_is_the_inverse(drawn):
    ours, others = zip(*drawn, strict=True)
    there, back = paired_ratio(ours, others), paired_ratio(others, ours)
    assert back.ratio == pytest.approx(1 / there.ratio)
    width = math.log(there.interval[1] / there.interval[0])
    assert math.log(back.interval[1] / back.interval[0]) == pytest.approx(width, rel=1e-6, abs=1e-9)


@few
@given(pairs, st.integers(2, 6))
def test_several_comparisons_widen_each_interval(drawn, comparisons):
    ours, others = zip(*drawn, strict=True)
    alone, among = paired_ratio(ours, others), paired_ratio(ours, others, comparisons)
    assert among.confidence == pytest.approx(1 - (1 - CONFIDENCE) / comparisons)
    assert among.interval[0] <= alone.interval[0] * (1 + 1e-12)
    assert among.interval[1] >= alone.interval[1] * (1 - 1e-12)


def test_the_middle_half():
    assert middle_half([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert middle_half([7.0]) == (7.0, 7.0)
