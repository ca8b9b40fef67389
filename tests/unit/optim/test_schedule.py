"""The learning rate: values of torchtitan v0.2.2 at every step, and what holds for every schedule."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quadriga.config.schema import LrScheduler
from quadriga.optim.schedule import build_schedule, fast_forward, lr_factor

sections = st.builds(
    dict,
    warmup_steps=st.integers(0, 60),
    total_steps=st.none() | st.integers(1, 120),
    decay_ratio=st.none() | st.floats(0, 1),
    decay_type=st.sampled_from(["linear", "sqrt", "cosine"]),
    min_lr_factor=st.floats(0, 1),
)
schedules = st.builds(
    lambda keys, variant: LrScheduler(**keys, variant=variant), sections, st.sampled_from(["torchtitan", "early_decay"])
)
lengths = st.integers(1, 100)

# What get_last_lr() of torchtitan v0.2.2's own LambdaLR gives at each step, with a peak of 8e-4: keys, steps, rates.
TORCHTITAN: list[tuple[dict[str, Any], int, list[float]]] = [
    (
        {"warmup_steps": 2},
        9,
        [
            *(0.0004, 0.0008, 0.0008, 0.0006857142857142858, 0.0005714285714285715, 0.00045714285714285713),
            *(0.0003428571428571429, 0.00022857142857142857, 0.00011428571428571432),
        ],
    ),
    (
        {"warmup_steps": 2, "decay_ratio": 0.5, "decay_type": "sqrt", "min_lr_factor": 0.1},
        9,
        [
            *(0.0004, 0.0008, 0.0008, 0.0008, 0.0008, 0.0008),
            *(0.00044000000000000007, 0.0002908831175456857, 0.00017646170927520423),
        ],
    ),
    (
        {"warmup_steps": 1, "decay_ratio": 0.45, "decay_type": "cosine"},
        11,
        [
            *(0.0008, 0.0008, 0.0008, 0.0008, 0.0008, 0.0008, 0.0008),
            *(0.000723606797749979, 0.0005236067977499791, 0.0002763932022500211, 7.639320225002106e-05),
        ],
    ),
    (  # the warm-up is longer than the schedule
        {"warmup_steps": 30, "total_steps": 7},
        7,
        [
            *(0.00011428571428571428, 0.00022857142857142857, 0.00034285714285714285, 0.00045714285714285713),
            *(0.0005714285714285715, 0.0006857142857142857, 0.0008),
        ],
    ),
    (  # warm-up and decay together are longer than the schedule
        {"warmup_steps": 6, "decay_ratio": 0.7, "min_lr_factor": 0.2},
        10,
        [
            *(0.00013333333333333334, 0.0002666666666666667, 0.0004, 0.0005333333333333334, 0.0006666666666666668),
            *(0.0008, 0.0008, 0.00064, 0.0004800000000000001, 0.00032),
        ],
    ),
    (  # the run ends before its schedule
        {"warmup_steps": 0, "total_steps": 12, "decay_type": "cosine", "min_lr_factor": 0.1},
        5,
        [0.0008, 0.0007877332974640645, 0.000751769145362398, 0.0006945584412271571, 0.00062],
    ),
    (
        {"warmup_steps": 3, "decay_ratio": 0.0},
        5,
        [0.0002666666666666667, 0.0005333333333333334, 0.0008, 0.0008, 0.0008],
    ),
]


def factors(section: LrScheduler, steps: int) -> list[float]:
    return [lr_factor(step, section, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize(("keys", "steps", "rates"), TORCHTITAN)
def test_the_rates_are_those_of_torchtitan_to_the_last_digit(keys: dict[str, Any], steps: int, rates: list[float]):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=8e-4)
    schedule = build_schedule(optimizer, LrScheduler(**keys), steps)
    for rate in rates:
        assert (optimizer.param_groups[0]["lr"], schedule.get_last_lr()) == (rate, [rate])
        optimizer.step()
        schedule.step()


def by_definition(
    index: int,
    steps: int,
    warmup_steps: int,
    total_steps: int | None,
    decay_ratio: float | None,
    decay_type: str,
    min_lr_factor: float,
) -> float:
    """torchtitan's definition, worked out in exact numbers: ramp, plateau with a virtual last step, decay.

    `index` counts from 0. Where a decay has passed its end the rate is held there."""
    length = steps if total_steps is None else total_steps
    ramp = warmup_steps if warmup_steps < length else length
    remaining = length - ramp
    decay = remaining
    if decay_ratio is not None and round(length * decay_ratio) < remaining:
        decay = round(length * decay_ratio)
    stable = length - ramp - decay + 1
    if index < ramp:
        return float(Fraction(index + 1, ramp))
    if index < ramp + stable or decay == 0:
        return 1.0
    gone = min(Fraction(index + 1 - ramp - stable, decay), Fraction(1))
    left = {
        "linear": float(1 - gone),
        "sqrt": 1 - math.sqrt(gone),
        "cosine": (1 + math.cos(math.pi * float(gone))) / 2,
    }[decay_type]
    return left + min_lr_factor * (1 - left)


@given(sections, lengths)
def test_every_rate_follows_the_definition(keys: dict[str, Any], steps: int) -> None:
    section = LrScheduler(**keys)
    for index in range(steps + 3):
        expected = by_definition(index, steps, **keys)
        assert lr_factor(index + 1, section, steps) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_the_ramp_begins_at_one_share_and_ends_at_the_peak() -> None:
    section = LrScheduler(warmup_steps=4, decay_ratio=0.0)
    assert factors(section, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_first_decay_step_is_at_the_peak_and_none_is_at_zero() -> None:
    assert factors(LrScheduler(warmup_steps=1), 6) == pytest.approx([1.0, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_phases_by_hand() -> None:
    section = LrScheduler(warmup_steps=2, decay_ratio=0.3, min_lr_factor=0.2)
    phases = section.phases(10)
    assert (phases.warmup, phases.plateau, phases.decay, phases.total) == (2, 5, 3, 10)
    assert factors(section, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 1, 1 - 0.8 / 3, 1 - 1.6 / 3])


@pytest.mark.parametrize(("length", "ratio", "decay"), [(5, 0.5, 2), (7, 0.5, 4), (10, 0.25, 2), (30, 0.05, 2)])
def test_half_a_step_of_decay_is_rounded_to_even(length: int, ratio: float, decay: int) -> None:
    assert LrScheduler(warmup_steps=0, decay_ratio=ratio).phases(length).decay == decay


def test_a_warmup_longer_than_the_schedule_is_shortened_to_it() -> None:
    assert factors(LrScheduler(warmup_steps=200), 4) == [1 / 4, 2 / 4, 3 / 4, 1]
    assert factors(LrScheduler(warmup_steps=200, total_steps=8), 4) == [1 / 8, 2 / 8, 3 / 8, 4 / 8]


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_a_run_that_outlives_its_schedule_stays_where_it_ended(shape: str) -> None:
    """torchtitan v0.2.2 gives step 10 the floor too; behind it, negative or rising rates."""
    section = LrScheduler(warmup_steps=0, total_steps=9, decay_type=shape, min_lr_factor=0.1)  # type: ignore[arg-type]
    assert lr_factor(5, section, 5) == lr_factor(5, section, 20)
    assert lr_factor(9, section, 20) > 0.1
    assert [lr_factor(step, section, 20) for step in (10, 11, 20)] == [0.1, 0.1, 0.1]


def test_without_a_decay_the_rate_stays_at_the_peak() -> None:
    """torchtitan v0.2.2 gives step 6 the peak too, and fails behind it."""
    section = LrScheduler(warmup_steps=3, decay_ratio=0.0, total_steps=5)
    assert [lr_factor(step, section, 9) for step in (5, 6, 7, 9)] == [1.0, 1.0, 1.0, 1.0]


def test_the_older_schedule_by_hand() -> None:
    section = LrScheduler(warmup_steps=2, decay_ratio=0.3, min_lr_factor=0.2, variant="early_decay")
    assert factors(section, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    assert lr_factor(11, section, 10) == 0.2
    assert factors(LrScheduler(warmup_steps=200, variant="early_decay"), 4) == [1 / 200, 2 / 200, 3 / 200, 4 / 200]
    plateau = LrScheduler(warmup_steps=0, total_steps=3, decay_ratio=0.0, min_lr_factor=0.3, variant="early_decay")
    assert factors(plateau, 5) == [1.0, 1.0, 1.0, 0.3, 0.3]


@given(schedules, lengths)
def test_every_factor_is_a_share_of_the_peak_and_never_wholly_wasted(section: LrScheduler, steps: int) -> None:
    assert all(0 <= factor <= 1 for factor in factors(section, steps))
    horizon = section.total_steps or steps
    assert all(factor > 0 for factor in factors(section, steps)[:horizon])


@given(schedules, lengths)
def test_up_then_down_and_within_the_floor(section: LrScheduler, steps: int) -> None:
    values = factors(section, steps)
    warmup = min(section.warmup_steps, steps)
    if section.variant == "torchtitan":
        warmup = min(section.phases(steps).warmup, steps)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert all(value >= section.min_lr_factor for value in values[warmup:])


@given(schedules, lengths, st.integers(0, 40))
def test_the_schedule_drives_every_group_and_resumes(section: LrScheduler, steps: int, stop: int) -> None:
    def make() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
        groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
        optimizer = torch.optim.SGD(groups, lr=0.5)
        return optimizer, build_schedule(optimizer, section, steps)

    optimizer, schedule = make()
    for _ in range(stop):
        optimizer.step()
        schedule.step()
    resumed_optimizer, resumed = make()
    resumed.load_state_dict(schedule.state_dict())
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    expected = 0.5 * lr_factor(stop + 1, section, steps)
    for each, driver in ((optimizer, schedule), (resumed_optimizer, resumed)):
        assert [group["lr"] for group in each.param_groups] == [expected] * 2
        assert driver.get_last_lr() == [expected] * 2


def test_a_schedule_that_was_put_forward_goes_on_as_one_that_walked():
    section = LrScheduler(warmup_steps=3)
    parameter = torch.nn.Parameter(torch.zeros(1))
    walked, put = (torch.optim.SGD([parameter], lr=1.0) for _ in range(2))
    one, other = build_schedule(walked, section, 10), build_schedule(put, section, 10)
    for _ in range(4):
        walked.step()
        one.step()
    fast_forward(other, 4)
    for _ in range(3):
        assert other.get_last_lr() == one.get_last_lr()
        assert put.param_groups[0]["lr"] == walked.param_groups[0]["lr"]
        for optimizer, schedule in ((walked, one), (put, other)):
            optimizer.step()
            schedule.step()
