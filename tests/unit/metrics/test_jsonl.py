"""metrics.jsonl: whole after any kill, and read as one run after any number of resumes."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadriga.metrics.jsonl import JsonLines, next_attempt, read_metrics


def record(step: int, attempt: int = 1, loss: float = 1.0, kind: str = "train") -> dict:
    return {"kind": kind, "step": step, "attempt": attempt, "loss": loss}


def write(path, *records) -> None:
    lines = JsonLines(path)
    for one in records:
        lines.write(one)
    lines.close()


def test_numbers_come_back_to_the_last_bit(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    write(path, record(1, loss=0.1 + 0.2), record(2, loss=math.inf), record(3, loss=math.nan))
    read = [one["loss"] for one in read_metrics(path)]
    assert read[:2] == [0.1 + 0.2, math.inf]
    assert math.isnan(read[2])


@given(cut=st.integers(min_value=1, max_value=400))
def test_a_file_torn_at_any_byte_is_whole_after_the_next_start(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "metrics.jsonl"
    write(path, *(record(step) for step in range(1, 7)))
    whole = path.read_bytes()
    torn = whole[: max(len(whole) - cut, 0)]
    path.write_bytes(torn)
    kept = torn.count(b"\n")
    assert len(read_metrics(path)) == kept  # readers pass over the torn line too
    write(path, record(10, attempt=2))
    assert [one["step"] for one in read_metrics(path)] == [*range(1, kept + 1), 10]


def test_a_torn_line_longer_than_one_read_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1))
    with path.open("a") as file:
        file.write('{"step": "' + "x" * 200_000)
    write(path, record(2))
    assert [one["step"] for one in read_metrics(path)] == [1, 2]


def test_replayed_steps_count_once_and_given_up_ones_not_at_all(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert next_attempt(path) == 1
    write(path, *(record(step, 1, 1.0) for step in (1, 10, 20, 30)))
    assert next_attempt(path) == 2
    write(path, record(15, 2, 9.0, "validation"), record(20, 2, 2.0))  # resumed from step 10, killed after 20
    assert [(one["step"], one["loss"]) for one in read_metrics(path)] == [(1, 1.0), (10, 1.0), (20, 2.0)]
    assert [(one["step"], one["loss"]) for one in read_metrics(path, kind="validation")] == [(15, 9.0)]
    assert next_attempt(path) == 3


def test_what_a_start_says_of_its_backends_is_no_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    said = {"kind": "backends", "backends": {"shard": "gloo"}}
    write(path, {**said, "step": 1, "attempt": 1}, record(1), record(2), record(3))
    assert [one["step"] for one in read_metrics(path)] == [1, 2, 3]
    write(path, {**said, "step": 3, "attempt": 2})  # resumed from step 2
    assert [one["step"] for one in read_metrics(path)] == [1, 2]
    assert next_attempt(path) == 3


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "attempt": 1}\n{"step": \n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_attempts_are_told_apart_even_after_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1, 4))
    with path.open("a") as file:
        file.write('{"kind": "train", "att')
    assert next_attempt(path) == 5
