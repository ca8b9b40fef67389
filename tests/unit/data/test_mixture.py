"""Mixtures: exact shares, an order that is never a window off, and the same rows whatever was read before."""

from __future__ import annotations

import time
from collections import Counter
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quadriga.config.mixing import PARTS, shares
from quadriga.config.mixing import StageShares as Stage
from quadriga.data.mixture import Mixture, order_of_a_period


def error(order, parts) -> Fraction:
    """The largest distance of a source from its exact share, over all slots of a period."""
    total, counts, worst = sum(parts), Counter(), Fraction(0)
    for slot, source in enumerate(order.tolist(), 1):
        counts[source] += 1
        worst = max(worst, *(abs(counts[i] - Fraction(slot * part, total)) for i, part in enumerate(parts)))
    return worst


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_no_source_is_a_window_off_at_any_slot(parts):
    order = order_of_a_period(parts)
    bound = 1 - Fraction(1, 2 * len(parts) - 2) if len(parts) > 1 else 0
    assert error(order, parts) <= bound  # Tijdeman 1980, theorem 1
    assert [np.count_nonzero(order == source) * sum(parts) for source in range(len(parts))] == [
        part * len(order) for part in parts
    ]


@pytest.mark.parametrize(
    "amounts",
    [["0.5", "0.5"], ["0.999", "0.001"], ["1"] * 40, ["0.7", "0.2", "0.1"], ["0.9", *["0.0025"] * 40]],
)
def test_weights_of_the_field(amounts):
    parts = shares([Decimal(amount) for amount in amounts])
    assert sum(parts) == PARTS
    total = sum(map(Decimal, amounts))
    assert all(abs(part - Decimal(amount) * PARTS / total) < 1 for part, amount in zip(parts, amounts, strict=True))
    assert len(order_of_a_period(parts)) <= PARTS
    if len(order_of_a_period(parts)) <= 2000:
        assert error(order_of_a_period(parts), parts) < 1


def test_shares_are_exact_or_rounded_to_a_millionth():
    assert shares([Decimal("0.7"), Decimal("0.2"), Decimal("0.1")]) == (700_000, 200_000, 100_000)
    assert shares([Decimal(1)] * 3) == (333_334, 333_333, 333_333)
    assert shares([Decimal("1e-9"), Decimal(1)]) == (1, 999_999)
    assert shares([Decimal(10**12), Decimal(3 * 10**12)]) == (250_000, 750_000)
    assert shares([Decimal(0), Decimal("0.3"), Decimal(0), Decimal("0.1")]) == (0, 750_000, 0, 250_000)
    for wrong in (["0"], ["-1", "2"], ["NaN"], ["Infinity", "1"], []):
        with pytest.raises(ValueError, match="positive"):
            shares([Decimal(amount) for amount in wrong])


def test_the_longest_period_takes_seconds():
    began = time.process_time()
    order = order_of_a_period(shares([Decimal(1) + Decimal(source) / 997 for source in range(40)]))
    assert len(order) == PARTS
    assert time.process_time() - began < 30  # 3 s on a core that is not shared


def plain(stages, batch, steps):
    """The windows of each source in each step, counted slot by slot."""
    counts, made = Counter(), []
    for step in range(steps):
        stage = [one for one in stages if one.first <= step][-1]
        read = [source for source, part in enumerate(stage.parts) if part]
        order = [read[place] for place in order_of_a_period([stage.parts[source] for source in read]).tolist()]
        rows = []
        for i in range(batch):
            source = order[((step - stage.first) * batch + i) % len(order)]
            rows.append((source, counts[source]))
            counts[source] += 1
        made.append(sorted(rows))
    return made


STAGES = [
    [Stage(0, (1,))],
    [Stage(0, (500_000, 500_000))],
    [Stage(0, (700_000, 200_000, 100_000))],
    [
        Stage(0, (999_000, 1_000, 0)),
        Stage(7, (0, 250_000, 750_000)),
        Stage(9, (100_000, 800_000, 100_000)),
    ],
]


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("batch", [1, 8, 84])
def test_any_step_is_that_of_a_plain_count(stages, batch):
    mixture = Mixture(stages, batch, seed=3)
    expected = plain(stages, batch, 24)
    for step in (23, 0, 9, 8, 7, 6, 15):
        sources, numbers = mixture.rows(step)
        assert sorted(zip(sources.tolist(), numbers.tolist(), strict=True)) == expected[step]
        counts = Counter(source for rows in expected[:step] for source, _ in rows)
        assert mixture.windows_before(step).tolist() == [counts[i] for i in range(len(stages[0].parts))]


def test_the_rows_of_a_source_change_with_the_step_and_the_seed():
    """With an even batch and two equal sources, the order alone would give each row one source for ever."""
    mixture = Mixture([Stage(0, (500_000, 500_000))], 8, seed=3)
    of_row_0 = [int(mixture.rows(step)[0][0]) for step in range(64)]
    assert 16 < sum(of_row_0) < 48
    other = Mixture([Stage(0, (500_000, 500_000))], 8, seed=4)
    assert [int(other.rows(step)[0][0]) for step in range(64)] != of_row_0
    assert of_row_0[:16] == [int(Mixture(mixture.stages, 8, seed=3).rows(step)[0][0]) for step in range(16)]


def test_far_steps_are_exact():
    mixture = Mixture([Stage(0, (333_336, 333_332, 333_332))], 2048, seed=0)
    step = 2**40 // 2048
    before = mixture.windows_before(step)
    assert before.sum() == step * 2048
    sources, numbers = mixture.rows(step)
    for source in range(3):
        found = np.sort(numbers[sources == source])
        assert found.tolist() == list(range(before[source], before[source] + len(found)))


@pytest.mark.parametrize(
    "stages",
    [
        [],
        [Stage(1, (1,))],
        [Stage(0, (1,)), Stage(0, (1,))],
        [Stage(0, (1,)), Stage(5, (1, 2))],
    ],
)
def test_stages_that_make_no_sense(stages):
    with pytest.raises(ValueError, match="stage"):
        Mixture(stages, 4, seed=0)
