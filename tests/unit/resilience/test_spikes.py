"""A spike is what plain arithmetic over the last losses says it is; the memory comes back to the bit."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quadriga.resilience.health import RecentLosses

CPU = torch.device("cpu")
LOSSES = st.lists(st.floats(0.01, 20), max_size=40)


def add(recent: RecentLosses, losses, wanted: bool = True) -> None:
    for loss in losses:
        recent.add_if(torch.tensor(wanted), torch.tensor(loss, dtype=torch.float64))


def compare(recent: RecentLosses, loss: float, sigmas: float = 6.0) -> tuple[bool, float, float]:
    spike, mean, deviation = recent.compare(torch.tensor(loss, dtype=torch.float64), sigmas)
    return bool(spike), mean.item(), deviation.item()


def exceeds(recent: RecentLosses, loss: float, sigmas: float) -> bool:
    return compare(recent, loss, sigmas)[0]


@given(losses=LOSSES.filter(bool), window=st.integers(1, 12))
def test_the_mean_and_the_deviation_are_those_of_the_last_losses(losses, window):
    recent = RecentLosses(window, CPU)
    add(recent, losses)
    _, mean, deviation = compare(recent, 1.0)
    assert mean == pytest.approx(statistics.fmean(losses[-window:]), rel=1e-12)
    assert deviation == pytest.approx(statistics.pstdev(losses[-window:]), rel=1e-6, abs=1e-9)


def test_nothing_is_a_spike_until_half_the_window_is_there():
    recent = RecentLosses(8, CPU)
    assert not exceeds(recent, 1e9, 1.0)
    add(recent, [2.0, 2.1, 1.9])
    assert not exceeds(recent, 1e9, 1.0)
    add(recent, [2.0])
    assert exceeds(recent, 1e9, 1.0)
    assert exceeds(recent, 2.5, 6.0)
    assert not exceeds(recent, 2.4, 6.0)  # the deviation is 0.0707
    assert not exceeds(recent, -1e9, 6.0)
    assert not exceeds(recent, float("nan"), 6.0)


def test_what_is_not_wanted_leaves_no_trace():
    recent = RecentLosses(4, CPU)
    add(recent, [1.0, 2.0, 3.0])
    before = recent.state_dict()
    add(recent, [float("nan"), 1e9, float("inf")], wanted=False)
    assert recent.state_dict() == before
    assert compare(recent, 1.0)[1] == 2.0


@given(before=LOSSES, after=LOSSES, window=st.integers(1, 12))
def test_the_memory_goes_through_json_and_on_to_the_bit(before, after, window):
    straight, resumed = RecentLosses(window, CPU), RecentLosses(window, CPU)
    add(straight, before)
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for loss in [*after, 1.0]:
        assert compare(straight, loss) == compare(resumed, loss)
        add(straight, [loss])
        add(resumed, [loss])
    assert straight.state_dict() == resumed.state_dict()


@given(before=LOSSES, window=st.integers(1, 12), other=st.integers(1, 12))
def test_another_window_keeps_the_newest(before, window, other):
    recent, changed = RecentLosses(window, CPU), RecentLosses(other, CPU)
    add(recent, before)
    changed.load_state_dict(recent.state_dict())
    kept = before[-min(window, other) :]
    assert changed.state_dict()["losses"] == kept
    add(changed, [7.0])
    assert changed.state_dict()["losses"] == [*kept, 7.0][-other:]
