"""metrics.jsonl: whole after any kill, and read as one run after any number of resumes."""

from __future__ import annotations

import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadriga.errors import UserError
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
    backends = {"kind": "backends", "backends": {"shard": "gloo"}}
    write(path, {**backends, "step": 1, "attempt": 1}, record(1), record(2), record(3))
    assert [one["step"] for one in read_metrics(path)] == [1, 2, 3]
    write(path, {**backends, "step": 3, "attempt": 2})  # resumed from step 2
    assert [one["step"] for one in read_metrics(path)] == [1, 2]
    assert next_attempt(path) == 3


DEEP = b'{"step": 2, "attempt": 1, "a": ' + b"[" * 5000 + b"]" * 5000 + b"}"
BAD_LINES = {
    "half": b'{"step": 2, ',
    "nothing": b"",
    "zeros": b"\x00" * 50,
    "not UTF-8": b'{"step": 2, "attempt": 1, "kind": "\xff"}',
    "a list": b"[1, 2]",
    "no step": b'{"attempt": 1}',
    "no attempt": b'{"step": 2, "attempt": null}',
    "attempt 0": b'{"step": 2, "attempt": 0}',
    "a half step": b'{"step": 2.5, "attempt": 1}',
    "a step as text": b'{"step": "2", "attempt": 1}',
    "a step that is true": b'{"step": true, "attempt": 1}',
    "before the first step": b'{"step": -2, "attempt": 1}',
    "a step of 5,000 digits": b'{"step": ' + b"2" * 5000 + b', "attempt": 1}',
    "a loss of 5,000 digits": b'{"step": 2, "attempt": 1, "loss": ' + b"2" * 5000 + b"}",
    "a loss of 300 digits": b'{"step": 2, "attempt": 1, "loss": ' + b"2" * 300 + b"}",
    "a loss as text": b'{"step": 2, "attempt": 1, "loss": "low"}',
    "a list as loss": b'{"step": 2, "attempt": 1, "loss": [1.0]}',
    "time that is no number": b'{"step": 2, "attempt": 1, "time": NaN}',
    "time before all times": b'{"step": 2, "attempt": 1, "time": -1}',
    "time beyond all calendars": b'{"step": 2, "attempt": 1, "time": 1e300}',
    "a negative duration": b'{"step": 2, "attempt": 1, "step_seconds": -0.5}',
    "an endless duration": b'{"step": 2, "attempt": 1, "seconds": Infinity}',
    "a kind that is no text": b'{"step": 2, "attempt": 1, "kind": {}}',
    "deep nesting": DEEP,
    "objects in objects": b'{"step": 2, "attempt": 1, "other": {"a": {}}}',
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_line_that_is_no_record_is_reported_and_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "attempt": 1}\n' + line + b'\n{"step": 3, "attempt": 1}\n')
    messages: list[str] = []
    assert [one["step"] for one in read_metrics(path, notices=messages)] == [1, 3]
    (notice,) = messages
    assert notice.startswith(f"{path}: 1 line is no record of a run and left out (line 2: ")
    assert len(notice) < 400 + len(str(path))
    assert next_attempt(path) == 2


def test_of_many_bad_lines_the_first_are_named_and_all_are_counted(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "attempt": 1}\n' + "no record\n" * 1000 + '{"step": 2')
    assert len(read_metrics(path)) == 1
    bad, torn = caplog.messages
    assert "1,000 lines are no records" in bad
    assert "line 2: " in bad
    assert "and 997 more" in bad
    assert "the last line is incomplete" in torn


def test_a_record_that_lacks_what_its_reader_needs_is_reported(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1), {"step": 2, "attempt": 1}, {"step": 3, "attempt": 1, "loss": None}, record(4))
    messages: list[str] = []
    assert [one["step"] for one in read_metrics(path, required=("loss",), notices=messages)] == [1, 4]
    assert "2 lines are no records" in messages[0]
    assert "line 2: it lacks loss" in messages[0]


@pytest.mark.parametrize("content", ["folder", "fifo", "long line"])
def test_what_is_no_log_is_refused(tmp_path, content):
    path = tmp_path / "metrics.jsonl"
    if content == "folder":
        path.mkdir()
    elif content == "fifo":
        os.mkfifo(path)
    else:
        path.write_bytes(b'{"step": 1, "attempt": 1, "a": "' + b"a" * (2 << 20) + b'"}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        read_metrics(path)


def test_many_attempts_take_no_more_time_than_many_steps(tmp_path):
    """20,000 attempts that each begin one step later: what is kept is not gone through anew at each."""
    path = tmp_path / "metrics.jsonl"
    write(path, *(record(step, attempt=step) for step in range(1, 20_001)))
    assert len(read_metrics(path)) == 20_000


def test_attempts_are_distinguished_even_after_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, record(1, 4))
    with path.open("a") as file:
        file.write('{"kind": "train", "att')
    assert next_attempt(path) == 5


def _written(path, *steps):
    lines = [{"kind": kind, "attempt": attempt, "step": step, "loss": loss} for kind, attempt, step, loss in steps]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    notices: list[str] = []
    return [(each["step"], each["loss"]) for each in read_metrics(path, notices=notices)], notices


def test_of_two_runs_in_one_file_the_later_counts_with_a_notice(tmp_path):
    first = [("train", 1, step, 1.0) for step in (1, 10, 20, 30)]
    second = [("train", 1, step, 2.0) for step in (1, 10)]
    found, notices = _written(tmp_path / "metrics.jsonl", *first, *second)
    assert found == [(1, 2.0), (10, 2.0)]
    assert len(notices) == 1
    assert "these may be lines of two runs, and the later ones count (1 place)" in notices[0]
    # a start with a lower number than the one before is of another run too
    found, notices = _written(tmp_path / "metrics.jsonl", ("train", 3, 5, 1.0), ("train", 1, 1, 2.0))
    assert (found, len(notices)) == ([(1, 2.0)], 1)


def test_a_resumed_run_is_no_two_runs(tmp_path):
    first = [("backends", 1, 1, 0), ("train", 1, 1, 1.0), ("train", 1, 10, 1.0), ("validation", 1, 10, 1.0)]
    second = [("backends", 2, 6, 0), ("train", 2, 6, 2.0), ("validation", 2, 10, 2.0), ("train", 2, 10, 2.0)]
    found, notices = _written(tmp_path / "metrics.jsonl", *first, *second)
    assert (found, notices) == ([(1, 1.0), (6, 2.0), (10, 2.0)], [])
