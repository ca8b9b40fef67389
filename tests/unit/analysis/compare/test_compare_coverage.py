"""How often the interval is right, on made runs whose truth is known.

The noise is what repeats on a shared machine show: a drift of each round that both settings feel (5 %), a difference
from run to run (1 % each), and steps that are sometimes slow and never fast. 5 rounds of 16 windows, but where a test
says otherwise. The count of hits in 4,000 sets has a standard deviation of 0.34 %; the seed is fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from quadriga.analysis.compare.statistics import CONFIDENCE, estimate_and_half_width, hodges_lehmann, paired_ratio

SETS, ROUNDS, WINDOWS = 4000, 5, 16


def made_runs(random, sets=SETS, difference=0.0, rounds=ROUNDS, of_runs=0.01, bad_runs=0.0):
    """Logarithms of step times of two settings, (sets, 2, rounds, windows); the second takes `difference` longer.

    `bad_runs`: the share of runs that something else slowed, by 8 % on average."""
    shared = random.normal(0, 0.05, (sets, 1, rounds, 1))
    run = random.normal(0, of_runs, (sets, 2, rounds, 1))
    bad = (random.random((sets, 2, rounds, 1)) < bad_runs) * np.abs(random.normal(0, 0.1, (sets, 2, rounds, 1)))
    step = random.gamma(1.0, 0.03, (sets, 2, rounds, WINDOWS))
    return shared + run + bad + step + np.array([0.0, difference]).reshape(2, 1, 1)


def intervals(difference=0.0, **noise):
    """Lower and upper ends, (sets,) each, in logarithms: of the pairs that `paired_ratio` makes of the same runs."""
    times = np.median(made_runs(np.random.default_rng(7), difference=difference, **noise), axis=3)
    estimate, reach = estimate_and_half_width(times[:, 1] - times[:, 0], CONFIDENCE)
    first, second = np.exp(times[0])
    assert np.log(paired_ratio(second, first).interval) == pytest.approx([(estimate - reach)[0], (estimate + reach)[0]])
    return estimate - reach, estimate + reach


def held(low, high, truth=0.0):
    return np.mean((low <= truth) & (truth <= high))


@pytest.mark.parametrize("rounds", [3, 4, 5, 8, 12])
@pytest.mark.parametrize("of_runs", [0.01, 0.0, 0.05], ids=["usual", "alike runs", "unlike runs"])
def test_the_interval_holds_the_truth_in_95_of_100_cases_not_less_and_not_more(rounds, of_runs):
    assert 0.935 <= held(*intervals(rounds=rounds, of_runs=of_runs)) <= 0.965


@pytest.mark.parametrize("rounds", [3, 5, 8])
def test_with_disturbed_runs_the_interval_is_wider_than_it_need_be(rounds):
    """A bad round widens the scatter more than it moves the estimate: told in docs/comparisons.md."""
    assert 0.955 <= held(*intervals(rounds=rounds, bad_runs=0.1)) <= 0.985


def test_a_difference_of_5_percent_is_found_and_held():
    low, high = intervals(difference=math.log(1.05))
    assert np.mean(low > 0) > 0.97
    assert not np.any(high < 0)
    assert 0.935 <= held(low, high, math.log(1.05)) <= 0.965


def test_pairing_finds_what_the_drift_of_the_rounds_would_hide():
    """The same runs, paired with those of another round: the drift no longer cancels out."""
    times = np.median(made_runs(np.random.default_rng(7), difference=math.log(1.05)), axis=3)
    estimate, reach = estimate_and_half_width(np.roll(times[:, 1], 1, axis=-1) - times[:, 0], CONFIDENCE)
    assert np.mean(abs(estimate) > reach) < 0.3


def test_why_no_percentile_interval():
    """Of five pairs, the middle 95 % of the resampled estimates hold the truth too seldom. With the steps drawn anew
    in each run as well, it depends on how much of the noise is theirs: this is why the module does otherwise."""
    random, sets = np.random.default_rng(7), 200
    hits = {"pairs": 0, "pairs and steps": 0}
    for logs in made_runs(random, sets=sets, of_runs=0.0):
        pairs = np.median(logs, axis=2)
        pairs = pairs[1] - pairs[0]
        drawn = random.integers(0, ROUNDS, (500, ROUNDS))
        resampled = hodges_lehmann(pairs[drawn])
        steps = random.integers(0, WINDOWS, (500, 2, ROUNDS, WINDOWS))
        medians = np.median(np.take_along_axis(logs[None], steps, axis=3), axis=3)
        both = np.take_along_axis(medians[:, 1] - medians[:, 0], drawn, axis=1)
        for name, values in (("pairs", resampled), ("pairs and steps", hodges_lehmann(both))):
            low, high = np.quantile(values, (0.025, 0.975))
            hits[name] += low <= 0 <= high
    assert hits["pairs"] / sets < 0.90
    assert hits["pairs and steps"] / sets > 0.985
