"""The check of the Chrome trace format finds each rule broken."""

from __future__ import annotations

from typing import Any

import pytest
from chrome_format import violations


def span(ts: float, dur: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "name": "a", "pid": 1, "tid": 1, "ts": ts, "dur": dur, **more}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in span(0, 1).items() if key != name}


def test_a_right_trace_passes():
    events = [span(0, 10), span(1, 3), span(4, 6), span(20, 0), {**span(0, 99), "tid": "stream 7"}]
    events += [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "rank 0"}}]
    events += [{"ph": phase, "name": "b", "pid": 1, "tid": 2, "ts": ts} for ts, phase in enumerate("BBEE")]
    events += [{"ph": phase, "name": "f", "cat": "c", "id": 7, "pid": 1, "tid": 2, "ts": 1} for phase in "sf"]
    assert violations({"traceEvents": events, "displayTimeUnit": "ms"}) == []


@pytest.mark.parametrize(
    ("events", "rule"),
    [
        (None, "1:"),
        (["text"], "2:"),
        ([without("ph")], "2:"),
        ([span(0, 1, ph="Z")], "2:"),
        ([without("name")], "2:"),
        ([span(0, 1, args=[])], "2:"),
        ([without("tid")], "3:"),
        ([span(float("nan"), 1)], "3:"),
        ([without("dur")], "4:"),
        ([span(0, -1)], "4:"),
        ([{"ph": "M", "name": "colour", "pid": 1, "args": {"name": "x"}}], "5:"),
        ([{"ph": "i", "name": "x", "pid": 1, "tid": 1, "ts": 0, "s": "everywhere"}], "6:"),
        ([{"ph": "s", "name": "x", "pid": 1, "tid": 1, "ts": 0}], "7:"),
        ([{"ph": "f", "name": "x", "pid": 1, "tid": 1, "ts": 0, "id": 3}], "7:"),
        ([{"ph": "C", "name": "x", "pid": 1, "tid": 1, "ts": 0, "args": {"n": "many"}}], "8:"),
        ([{"ph": "E", "name": "x", "pid": 1, "tid": 1, "ts": 0}], "9:"),
        ([{"ph": "B", "name": "x", "pid": 1, "tid": 1, "ts": 0}], "9:"),
        ([span(0, 10), span(5, 10)], "10:"),
    ],
)
def test_a_broken_rule_is_named(events, rule):
    trace = {"traceEvents": events} if events is not None else []
    assert [line.startswith(rule) for line in violations(trace)] == [True]


def test_a_time_unit_that_no_viewer_knows():
    assert violations({"traceEvents": [], "displayTimeUnit": "weeks"})[0].startswith("1:")
