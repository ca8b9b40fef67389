"""The arithmetic of a record, by a clock that the test turns."""

from __future__ import annotations

import pytest
import torch

from quadriga.config.schema import Metrics
from quadriga.metrics.meter import Meter
from quadriga.metrics.step_metrics import StepMetrics


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Clock, **keys) -> Meter:
    facts = {
        "steps": 25,
        "first_step": 1,
        "tokens_seen": 0,
        "attempt": 1,
        "devices": 4,
        "flops_per_token": 2e9,
        "peak_flops": 1e13,
        "device": torch.device("cpu"),
    }
    return Meter(Metrics(log_freq=10), clock=clock, **{**facts, **keys})


def metrics(step: int, loss: float = 2.5, wait: float = 0.0) -> StepMetrics:
    more = {"max_loss": torch.tensor(2 * loss), "skipped": torch.tensor(step // 20), "verdict": torch.zeros(5)}
    return StepMetrics(step, torch.tensor(loss), torch.tensor(0.75), 3e-4, 1000 * step, wait, **more)


def test_records_come_at_the_first_every_tenth_and_the_last_step():
    clock = Clock()
    one = meter(clock)
    assert [step for step in range(1, 26) if one.record(metrics(step)) is not None] == [1, 10, 20, 25]


def test_rates_cover_the_steps_since_the_record_before():
    clock = Clock()
    one = meter(clock)
    clock.now += 7  # the first step, with all its warm-up
    first = one.record(metrics(1))
    assert first["step_seconds"] == 7
    for step in range(2, 11):
        clock.now += 2
        record = one.record(metrics(step, loss=0.1, wait=0.5))
    assert record["tokens_per_second"] == pytest.approx(500)
    assert record["tokens_per_second_per_device"] == pytest.approx(125)
    assert record["tflops"] == pytest.approx(2e9 * 125 / 1e12)
    assert record["mfu"] == pytest.approx(2e9 * 125 / 1e13)
    assert record["step_seconds"] == pytest.approx(2)
    assert record["data_wait"] == pytest.approx(4.5)
    assert record["data_wait_share"] == pytest.approx(0.25)
    assert record["eta_seconds"] == pytest.approx(15 * 2)  # the slow first step is not in it
    assert record["elapsed_seconds"] == pytest.approx(25)
    assert record["loss"] == torch.tensor(0.1).item()  # float32 to the last bit, not rounded for show
    assert record["max_loss"] == 2 * record["loss"]
    assert record["skipped_steps"] == 0


def test_saving_and_validating_are_no_training_time():
    clock = Clock()
    one = meter(clock)
    one.record(metrics(1))
    with one.paused():
        clock.now += 50
    for step in range(2, 11):
        clock.now += 1
        record = one.record(metrics(step))
    assert record["step_seconds"] == pytest.approx(1)
    assert record["tokens_per_second"] == pytest.approx(1000)
    assert record["eta_seconds"] == pytest.approx(15 * 59 / 9)  # but the user waits through it
    clock.now += 10
    for step in range(11, 21):
        record = one.record(metrics(step))
    assert record["step_seconds"] == pytest.approx(1)  # a pause counts once


def test_a_resumed_run_counts_from_where_it_stands():
    clock = Clock()
    one = meter(clock, first_step=16, tokens_seen=15_000, attempt=2)
    for step in range(16, 21):
        clock.now += 1
        record = one.record(metrics(step))
    assert record["attempt"] == 2
    assert record["tokens_per_second"] == pytest.approx(1000)
    assert record["step_seconds"] == pytest.approx(1)


def test_an_unknown_device_shows_no_mfu():
    assert meter(Clock(), peak_flops=None).record(metrics(1))["mfu"] is None


def test_a_run_in_float32_is_also_measured_by_the_peak_in_bfloat16():
    clock = Clock()
    one = meter(clock, bfloat16_peak=1.5e14)
    clock.now += 2
    record = one.record(metrics(1))
    assert record["mfu_bfloat16"] == pytest.approx(record["mfu"] / 15)
    assert meter(Clock()).record(metrics(1))["mfu_bfloat16"] is None


def test_memory_is_that_of_the_process():
    block = torch.ones(64 << 20, dtype=torch.uint8)
    record = meter(Clock()).record(metrics(1))
    assert block.nbytes / 2**30 < record["memory_resident_gib"] <= record["memory_peak_gib"]
    assert 0 < record["memory_peak_percent"] < 100


def test_validation_has_records_of_its_own():
    record = meter(Clock()).validation(10, 2.25, 4096, 2.0)
    assert (record["kind"], record["loss"], record["tokens_per_second"]) == ("validation", 2.25, 2048)
