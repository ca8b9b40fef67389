"""Records of several held-out sets: their fields, curves and console lines, and how they are read back."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from quadriga.config.schema import Metrics
from quadriga.metrics.goodput import compute_goodput
from quadriga.metrics.jsonl import read_metrics
from quadriga.metrics.loggers import Console, curves_of_record
from quadriga.metrics.meter import Meter
from quadriga.train.validate import ValidationCost


def validation(step: int, loss: float, label: str | None = None, attempt: int = 1) -> dict:
    device = torch.device("cpu")
    facts = {"steps": 100, "first_step": 1, "tokens_seen": 0, "devices": 1, "flops_per_token": 1.0, "peak_flops": None}
    return Meter(Metrics(), attempt=attempt, device=device, **facts).validation(step, loss, 4096, 2.0, label)


def write(path: Path, *records: dict) -> Path:
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


def test_a_set_has_a_field_curves_and_a_line_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    assert "set" not in validation(10, 2.0)
    record = validation(10, 2.25, "web")
    assert record["set"] == "web"
    curves = {"validation_metrics/web/loss": 2.25, "validation_metrics/web/throughput(tps)": 2048.0}
    assert curves_of_record(record) == curves
    assert curves_of_record(validation(10, 2.25)) == {name.replace("/web", ""): value for name, value in curves.items()}
    with caplog.at_level(logging.INFO, "quadriga"):
        for each in (record, validation(10, 2.25)):
            Console(100, colour=False).write(each)
    lines = [entry.getMessage() for entry in caplog.records]
    assert lines[0].startswith("step  10/100  validation loss web 2.25000  over ")
    assert lines[1].startswith("step  10/100  validation loss 2.25000  over ")


def test_each_step_and_set_has_one_record(tmp_path: Path) -> None:
    """The later attempt's, in the order of the file, and without a word about two runs."""
    path = tmp_path / "metrics.jsonl"
    write(path, *(validation(step, step, name) for step in (1, 10, 20) for name in ("web", "code")))
    write(path, *(validation(20, 7.0, name, attempt=2) for name in ("web", "code")))
    notices: list[str] = []
    found = [(one["step"], one["set"], one["loss"]) for one in read_metrics(path, "validation", notices=notices)]
    early = [(1, "web", 1), (1, "code", 1), (10, "web", 10), (10, "code", 10)]
    assert found == [*early, (20, "web", 7.0), (20, "code", 7.0)]
    assert notices == []
    write(path, validation(20, 8.0, "web", attempt=2))
    assert [one["loss"] for one in read_metrics(path, "validation", notices=notices)][-1] == 8.0
    assert "these may be lines of two runs" in notices[0]


def test_a_set_that_is_no_name_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "metrics.jsonl", {**validation(1, 1.0), "set": ["a"]}, validation(1, 2.0, "b"))
    assert [one["loss"] for one in read_metrics(path, "validation", notices=[])] == [1.0, 2.0]


def test_the_time_of_all_sets_counts_as_validation() -> None:
    def at(time: float, **fields) -> dict:
        return {"attempt": 1, "time": time, "rank": 0, **fields}

    events = [at(1000, event="start", step=0), at(1010, event="ready", step=0)]
    events += [at(1030, event="end", step=1, code=0)]
    train = {"kind": "train", "step": 1, "elapsed_seconds": 10.0, "data_wait": 0.0}
    records = [at(1020, **train)]
    records += [at(1022 + 2 * n, kind="validation", step=1, seconds=2.0, set=name) for n, name in enumerate("ab")]
    assert compute_goodput(events, records).seconds["validated"] == 4.0


def test_a_costly_validation_is_found_once_and_not_at_the_start() -> None:
    cost = ValidationCost()
    assert cost.check(0.0, 50.0) is None  # the first compiles
    assert cost.check(150.0, 155.0) is None  # 5 % of 100 s
    assert cost.check(255.0, 260.5) == (5.5, 100.0)
    assert cost.check(261.0, 300.0) is None
