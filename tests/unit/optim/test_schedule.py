"""The learning rate: values at named steps, and what holds for every schedule."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quadriga.config.schema import LrScheduler
from quadriga.optim.schedule import build_schedule, decay_steps, lr_factor, wind_to

schedules = st.builds(
    LrScheduler,
    warmup_steps=st.integers(0, 60),
    total_steps=st.none() | st.integers(1, 120),
    decay_ratio=st.none() | st.floats(0, 1),
    decay_type=st.sampled_from(["linear", "sqrt", "cosine"]),
    min_lr_factor=st.floats(0, 1),
)
lengths = st.integers(1, 100)


def factors(section: LrScheduler, steps: int) -> list[float]:
    return [lr_factor(step, section, steps) for step in range(1, steps + 1)]


def test_the_ramp_begins_at_one_share_and_ends_at_the_peak() -> None:
    section = LrScheduler(warmup_steps=4, decay_ratio=0.0)
    assert factors(section, 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_without_a_ratio_the_decay_follows_the_warmup_and_wastes_no_step_on_zero() -> None:
    section = LrScheduler(warmup_steps=1)
    assert factors(section, 5) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_warmup_plateau_and_decay_by_hand() -> None:
    section = LrScheduler(warmup_steps=2, decay_ratio=0.3, min_lr_factor=0.2)
    assert decay_steps(section, 10) == 3
    assert factors(section, 10) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])
    assert lr_factor(11, section, 10) == 0.2


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5)), ("cosine", 0.5 * (1 + math.cos(math.pi / 2)))]
)
def test_shapes_at_half_of_the_decay(shape: str, middle: float) -> None:
    section = LrScheduler(warmup_steps=0, decay_type=shape)  # type: ignore[arg-type]
    assert lr_factor(5, section, 9) == pytest.approx(middle)


def test_a_warmup_longer_than_the_run_is_cut_off_not_rescaled() -> None:
    assert factors(LrScheduler(warmup_steps=200), 4) == [1 / 200, 2 / 200, 3 / 200, 4 / 200]


def test_a_horizon_of_its_own_outlasts_or_ends_before_the_run() -> None:
    section = LrScheduler(warmup_steps=0, total_steps=9, min_lr_factor=0.1)
    assert lr_factor(5, section, 5) == lr_factor(5, section, 9) == pytest.approx(0.55)
    assert lr_factor(10, section, 20) == lr_factor(20, section, 20) == 0.1


@given(schedules, lengths)
def test_every_factor_is_a_share_of_the_peak_and_never_wholly_wasted(section: LrScheduler, steps: int) -> None:
    assert all(0 <= factor <= 1 for factor in factors(section, steps))
    horizon = section.total_steps or steps
    assert all(factor > 0 for factor in factors(section, steps)[:horizon])


@given(schedules, lengths)
def test_up_then_down_and_within_the_floor(section: LrScheduler, steps: int) -> None:
    values = factors(section, steps)
    warmup = min(section.warmup_steps, steps)
    assert values[:warmup] == sorted(values[:warmup])
    assert values[warmup:] == sorted(values[warmup:], reverse=True)
    assert all(value >= section.min_lr_factor for value in values[warmup:])


@given(schedules, lengths)
def test_neighbours_never_jump_by_more_than_the_ramp_or_the_root_allows(section: LrScheduler, steps: int) -> None:
    horizon = section.total_steps or steps
    if horizon < section.warmup_steps:
        return  # a ramp cut off by its horizon falls to the floor at once, as asked
    decay = decay_steps(section, horizon)
    largest = 1.0 if decay == 0 else max(math.sqrt(1 / (decay + 1)), math.pi / 2 / (decay + 1))
    values = factors(section, steps)
    for step, (before, after) in enumerate(pairwise(values), start=1):
        ramp = 1 / section.warmup_steps if step < section.warmup_steps else largest
        assert abs(after - before) <= ramp + 1e-12


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
    wind_to(other, 4)
    for _ in range(3):
        assert other.get_last_lr() == one.get_last_lr()
        assert put.param_groups[0]["lr"] == walked.param_groups[0]["lr"]
        for optimizer, schedule in ((walked, one), (put, other)):
            optimizer.step()
            schedule.step()
