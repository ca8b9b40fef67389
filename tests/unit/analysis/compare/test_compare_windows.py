"""Which steps of a run are timed."""

from __future__ import annotations

import pytest

from quadriga.analysis.compare.runs import counted_windows, cycle_of, predicted_records
from quadriga.config.schema import Metrics
from quadriga.metrics.meter import Meter
from quadriga.metrics.profiler import profiler_schedule

OFF = {"enable_profiling": False}


def profiling(length, warmup, active):
    return {
        "enable_profiling": True,
        "profile_freq": length,
        "profiler_warmup": warmup,
        "profiler_active": active,
    }


def steps_of(windows):
    return [(window.first, window.last) for window in windows]


def test_windows_that_hold_a_step_of_the_warm_up_do_not_count():
    windows, warning = counted_windows(predicted_records(20, 4), OFF, 20, warmup=5)
    assert steps_of(windows) == [(9, 12), (13, 16), (17, 20)]  # records at 1, 4, 8, 12, ...: (5, 8] holds step 5
    assert warning is None
    windows, _ = counted_windows(predicted_records(20, 4), OFF, 20, warmup=4)
    assert steps_of(windows)[0] == (5, 8)
    assert steps_of(counted_windows(predicted_records(4, 1), OFF, 4, warmup=1)[0]) == [(2, 2), (3, 3), (4, 4)]


def test_steps_that_the_profiler_slows_do_not_count():
    """Cycles of 10 with 2 + 3 at the end; the trace is written in the step after them."""
    windows, warning = counted_windows(predicted_records(24, 1), profiling(10, 2, 3), 24, warmup=1)
    assert [last for _, last in steps_of(windows)] == [2, 3, 4, 5, 12, 13, 14, 15, 22, 23, 24]
    assert warning is None


def test_where_too_few_are_left_they_count_and_a_warning_says_so():
    windows, warning = counted_windows(predicted_records(20, 1), profiling(9, 3, 5), 20, warmup=5)
    assert len(windows) == 15
    assert "profiler" in warning


def test_no_window_is_no_window():
    assert counted_windows(predicted_records(10, 10), OFF, 10, warmup=5) == ([], None)
    assert counted_windows([], OFF, 10, warmup=5) == ([], None)


def test_a_resumed_run_warms_up_twice():
    """The second attempt goes on after step 8, and its first record is that of step 9."""
    records = predicted_records(8, 1) + [{"step": step, "attempt": 2} for step in range(9, 21)]
    windows, _ = counted_windows(records, OFF, 20, warmup=3)
    assert [last for _, last in steps_of(windows)] == [4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 17, 18, 19, 20]


@pytest.mark.parametrize(("length", "warmup", "active", "steps"), [(10, 3, 5, 40), (100, 3, 5, 20), (7, 0, 7, 30)])
def test_the_cycles_are_those_of_the_profiler(length, warmup, active, steps):
    cycle = cycle_of(profiling(length, warmup, active), steps)
    assert cycle is not None
    action = profiler_schedule(cycle, steps + cycle.length)
    for step in range(1, steps + 1):
        busy = action(step - 1).name != "NONE"  # the profiler counts from 0
        writes = step > 1 and action(step - 2).name == "RECORD_AND_SAVE"
        assert cycle.disturbs(step, first_step=1) == (busy or writes)


@pytest.mark.parametrize(("steps", "log_freq"), [(20, 4), (21, 4), (3, 10), (1, 1)])
def test_the_predicted_records_are_those_of_the_meter(steps, log_freq):
    section = Metrics(log_freq=log_freq)
    meter = Meter.__new__(Meter)
    meter._log_freq, meter._steps = section.log_freq, steps
    logged = [step for step in range(1, steps + 1) if meter.is_logging_step(step)]
    assert [record["step"] for record in predicted_records(steps, log_freq)] == logged
