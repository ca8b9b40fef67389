"""Sets of time against sets of small whole moments."""

from __future__ import annotations

import numpy as np
import pytest

from quadriga.analysis.trace.intervals import EMPTY, clip, intersection, subtract, total_length, union, window_index


def moments(found):
    return {moment for start, end in found for moment in range(int(start), int(end))}


def some(seed, most=40):
    draw = np.random.default_rng(seed)
    starts = draw.integers(0, 100, draw.integers(0, most))
    return np.column_stack([starts, starts + draw.integers(0, 12, len(starts))]).astype(float)


@pytest.mark.parametrize("seed", range(60))
def test_sets_of_time_are_sets(seed):
    first, second = some(seed), some(seed + 1000, most=8)
    one, other = union(first), union(second)
    assert moments(one) == moments(first)
    assert total_length(one) == len(moments(first))
    assert (one[1:, 0] > one[:-1, 1]).all(), "sorted, and apart"
    assert moments(union(first, second)) == moments(first) | moments(second)
    assert moments(intersection(one, other)) == moments(one) & moments(other)
    assert moments(subtract(one, other)) == moments(one) - moments(other)
    assert total_length(subtract(one, other)) + total_length(intersection(one, other)) == total_length(one)
    assert moments(clip(one, 20, 60)) == moments(one) & set(range(20, 60))
    places = window_index(np.arange(110.0), one)
    assert {int(moment) for moment in np.flatnonzero(places >= 0)} == moments(one)


def test_nothing_is_a_set_too():
    one = union(np.array([[1.0, 2.0]]))
    assert total_length(EMPTY) == total_length(intersection(one, EMPTY)) == total_length(subtract(EMPTY, one)) == 0
    assert subtract(one, EMPTY) is one
    assert window_index(np.array([1.5]), EMPTY).tolist() == [-1]
