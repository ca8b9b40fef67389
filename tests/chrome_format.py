"""Whether a file keeps the Chrome trace event format, rule by rule. docs/ccl-bench.md lists the rules.

The format: "Trace Event Format" (docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

PHASES = set("BEXiICbnesStTfFPNODMVvRcp(),")
METADATA = {"process_name", "process_labels", "process_sort_index", "thread_name", "thread_sort_index"}
SCOPES = {"g", "p", "t"}
ROUNDING = 0.0021  # microseconds: two stamps, each written with three decimals
Event = dict[str, Any]


def violations(trace: Any) -> list[str]:
    """What breaks a rule, in words; nothing where the trace keeps them all."""
    if not isinstance(trace, dict) or not isinstance(trace.get("traceEvents"), list):
        return ["1: the file is no object with a list `traceEvents`"]
    found = [] if trace.get("displayTimeUnit", "ms") in ("ms", "ns") else ["1: displayTimeUnit is neither ms nor ns"]
    events = trace["traceEvents"]
    for number, event in enumerate(events):
        found += [f"{broken} (event {number}: {str(event)[:120]})" for broken in _of_one(event)]
    if not found:
        found += [*_flows(events), *_pairs(events), *_nesting(events)]
    return found


def _of_one(event: Any) -> Iterator[str]:
    if not isinstance(event, dict):
        yield "2: an event is no object"
        return
    phase = event.get("ph")
    if not isinstance(phase, str) or len(phase) != 1 or phase not in PHASES:
        yield "2: `ph` is no known phase"
        return
    if not isinstance(event.get("name"), str) or "pid" not in event:
        yield "2: `name` or `pid` is missing"
    if "args" in event and not isinstance(event["args"], dict):
        yield "2: `args` is no object"
    if phase == "M":
        if event.get("name") not in METADATA or not event.get("args"):
            yield "5: metadata of an unknown name, or without args"
        return
    if "tid" not in event or not _is_time(event.get("ts")):
        yield "3: `tid` is missing, or `ts` is no number of 0 or more"
    if phase == "X" and not _is_time(event.get("dur")):
        yield "4: a complete event without a `dur` of 0 or more"
    if phase in "iI" and event.get("s", "t") not in SCOPES:
        yield "6: an instant with an unknown scope"
    if phase in "stf" and "id" not in event:
        yield "7: a flow without `id`"
    if phase == "C" and not all(isinstance(value, int | float) for value in event.get("args", {}).values()):
        yield "8: a counter with what is no number"


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _flows(events: list[Event]) -> Iterator[str]:
    """An arrow that ends must have begun."""
    began = {(event.get("cat"), event["id"]) for event in events if event["ph"] == "s"}
    ended = {(event.get("cat"), event["id"]) for event in events if event["ph"] == "f"}
    if ended - began:
        yield f"7: {len(ended - began)} flows end that did not begin"


def _pairs(events: list[Event]) -> Iterator[str]:
    """On each thread, begins and ends are as many, and no end comes first."""
    depth: dict[Any, int] = defaultdict(int)
    for event in sorted((event for event in events if event["ph"] in "BE"), key=lambda event: event["ts"]):
        thread = event["pid"], event["tid"]
        depth[thread] += 1 if event["ph"] == "B" else -1
        if depth[thread] < 0:
            yield f"9: an end without a begin on {thread}"
            return
    if any(depth.values()):
        yield "9: a begin without an end"


def _nesting(events: list[Event]) -> Iterator[str]:
    """Complete events of one thread lie within each other or apart: viewers clip what overlaps by half."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            threads[event["pid"], event["tid"]].append(event)
    for thread, spans in threads.items():
        open_ends: list[float] = []
        for span in sorted(spans, key=lambda span: (span["ts"], -span["dur"])):
            end = span["ts"] + span["dur"]
            while open_ends and open_ends[-1] <= span["ts"] + ROUNDING:
                open_ends.pop()
            if open_ends and end > open_ends[-1] + ROUNDING:
                yield f"10: {span['name']} overlaps another span of {thread} by {end - open_ends[-1]:.3f} us"
                break
            open_ends.append(end)
