"""The analysis of one rank's trace, from which that of all ranks is built: the time of each step by part, and the
timeline of one step as spans for a chart. docs/traces.md defines every figure."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quadriga.analysis.trace import kernels
from quadriga.analysis.trace.calls import Call, RankCalls, find_calls
from quadriga.analysis.trace.intervals import EMPTY, Spans, clip, intersection, subtract, total_length, union
from quadriga.analysis.trace.metadata import Metadata
from quadriga.analysis.trace.read import KERNEL, RankTrace, Step, read_trace

DATA_WAIT = re.compile(r"^(quadriga:data_wait|enumerate\(DataLoader\)#)")
HOST_AXIS = "host"  # groups that serve the host: saves and stop requests, for which no step waits


@dataclass(frozen=True)
class DeviceActivity:
    """Unions of time of one rank. `communication` None: the run has several ranks, and no call was identified.
    `data_wait` None: the trace has no mark of it. `memcpy` None: there is no device."""

    compute: Spans
    communication: Spans | None
    memcpy: Spans | None
    data_wait: Spans | None
    on_device: bool


def device_activity(trace: RankTrace, found: RankCalls, work: kernels.HostWork, single_rank: bool) -> DeviceActivity:
    """`single_rank`: the run has one rank, so finding no call means that there is no communication."""
    calls = without_host_calls(found.calls)
    known = bool(calls) or single_rank
    is_marked = any(map(DATA_WAIT.match, trace.names))
    is_kernel = trace.device.category == KERNEL
    computes, copies = ~found.owned & is_kernel, ~found.owned & ~is_kernel
    return DeviceActivity(
        compute=union(trace.device.spans(computes)) if trace.on_device else work.spans,
        communication=union(found.waits, *(call.rows for call in calls)) if known else None,
        memcpy=union(trace.device.spans(copies)) if trace.on_device else None,
        data_wait=union(trace.ops.spans(trace.is_named(trace.ops, DATA_WAIT))) if is_marked else None,
        on_device=trace.on_device,
    )


def without_host_calls(calls: list[Call]) -> list[Call]:
    """The calls without those of groups that serve the host."""
    return [call for call in calls if call.axis != HOST_AXIS]


def step_breakdown(found: DeviceActivity, step: Step) -> dict[str, float | None]:
    """Seconds of one step by part. Compute, exposed parts, data wait and rest add up to the step."""

    def within(spans: Spans) -> Spans:
        return clip(spans, step.start, step.end)

    compute = within(found.compute)
    sent = None if found.communication is None else within(found.communication)
    copied = None if found.memcpy is None else within(found.memcpy)
    waited = None if found.data_wait is None else within(found.data_wait)
    busy = compute if sent is None else union(compute, sent)
    exposed_copies = None if copied is None else subtract(copied, busy)
    busy = busy if copied is None else union(busy, copied)
    idle_for_data = None if waited is None else subtract(waited, busy)
    rest = step.seconds - total_length(busy) - (total_length(idle_for_data) if idle_for_data is not None else 0.0)
    return {
        "seconds": step.seconds,
        "compute_s": total_length(compute),
        "communication_s": None if sent is None else total_length(sent),
        "exposed_communication_s": None if sent is None else total_length(subtract(sent, compute)),
        "memcpy_s": None if copied is None else total_length(copied),
        "exposed_memcpy_s": None if exposed_copies is None else total_length(exposed_copies),
        "data_wait_s": None if idle_for_data is None else total_length(idle_for_data),
        "host_idle_s": rest if found.on_device else None,
        "rest_s": rest,
    }


def mean_breakdown(steps: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Means over steps. A figure must be None in all steps or in none."""
    values = {name: [value for step in steps if (value := step[name]) is not None] for name in steps[0]}
    return {name: sum(own) / len(own) if own else None for name, own in values.items()}


def seconds_of(calls: list[Call], found: DeviceActivity, steps: Spans) -> tuple[float, float]:
    """Seconds per step in which one of the calls ran, and in which nothing computed during that time."""
    inside = intersection(union(*(call.rows for call in calls)), union(steps))
    return total_length(inside) / len(steps), total_length(subtract(inside, found.compute)) / len(steps)


# --- the timeline of one step, merged so that few spans remain -------------------------------------------------------


MAX_SPANS = 2000  # of all ranks and streams together, approximately
Span = tuple[float, float, str]


def timeline_strips(
    trace: RankTrace, found: RankCalls, active: DeviceActivity, step: Step, files: int
) -> dict[str, list[Span]]:
    """Spans by stream, in seconds from the trace's origin. `host`: the time in which nothing else runs."""
    budget = max(MAX_SPANS // (4 * files), 8)
    sent: dict[str, list[Spans]] = defaultdict(list)
    for call in without_host_calls(found.calls):
        if len(call.rows) and call.end > step.start and call.start < step.end:
            sent[f"{call.axis} {call.info.kind}"].append(call.rows)
    parts = (active.communication, active.data_wait, active.memcpy)
    communication, waited, copies = (EMPTY if part is None else part for part in parts)
    whole = np.array([[step.start, step.end]])
    idle = subtract(subtract(whole, union(active.compute, copies, communication)), waited)
    streams = {
        "compute": {"compute": active.compute},
        "communication": {name: union(*rows) for name, rows in sent.items()},
        "memcpy": {"copies": copies},
        "host": {"data wait": waited, "idle": idle},
    }
    return {name: _coarse(sets, step, budget) for name, sets in streams.items() if any(map(len, sets.values()))}


def _coarse(sets: dict[str, Spans], step: Step, budget: int) -> list[Span]:
    """All sets as one list of spans. Narrow gaps are closed until at most `budget` spans are left."""
    gap = step.seconds / 4000
    named = [(name, union(clip(spans, step.start, step.end), gap=gap)) for name, spans in sets.items()]
    every = sorted((start, end, name) for name, spans in named for start, end in spans.tolist())
    while True:
        merged = _close(every, gap)
        if len(merged) <= budget:
            return merged
        gap *= 1.5


def _close(spans: list[Span], gap: float) -> list[Span]:
    """Merge spans of one name with a narrow gap, and short spans into the one before them."""
    merged: list[Span] = []
    for start, end, name in spans:
        if merged and start - merged[-1][1] <= gap and (name == merged[-1][2] or end - start <= gap):
            last = merged[-1]
            merged[-1] = (last[0], max(last[1], end), last[2])
        else:
            merged.append((start, end, name))
    return merged


# --- the whole analysis ----------------------------------------------------------------------------------------------


CallKey = tuple[str, str, str, str, int | None]  # axis, collective, backend, found by, ranks of the group


@dataclass(frozen=True)
class RankResult:
    """`seconds`: per step, by kind of call: time in which it ran, and the part in which nothing computed. `missing`:
    calls without a row on the device or a range on gloo's threads. `origin_ns`: time 0 in ns since 1970."""

    rank: int
    origin_ns: int | None
    metadata: Metadata
    on_device: bool
    steps: tuple[Step, ...]
    step_breakdowns: list[dict[str, float | None]]
    calls: list[Call]
    seconds: dict[CallKey, tuple[float, float]]
    missing: int
    totals: kernels.KernelTotals
    strips: dict[str, list[Span]]
    has_data_marks: bool
    warnings: list[str]


def key_of(call: Call) -> CallKey:
    return call.axis, call.info.kind, call.info.backend or "?", call.found_by, call.info.group_size


def analyse_rank(path: Path, rank: int | None, files: int) -> RankResult:
    """Read and analyse one file. `rank`: used if the file has none. `files`: number of files in the set."""
    trace = read_trace(path, rank)
    found = find_calls(trace)
    done = kernels.host_work(trace, found)
    active = device_activity(trace, found, done, single_rank=trace.metadata.world_size == 1)
    own = [call for call in found.calls if call.step >= 0]
    by_key: dict[CallKey, list[Call]] = defaultdict(list)
    for call in own:
        by_key[key_of(call)].append(call)

    step_breakdowns = [step_breakdown(active, step) for step in trace.steps]
    sent = sum(each["communication_s"] or 0.0 for each in step_breakdowns)
    shown = trace.steps[len(trace.steps) // 2]
    return RankResult(
        rank=trace.rank,
        origin_ns=trace.origin_ns,
        metadata=trace.metadata,
        on_device=trace.on_device,
        steps=trace.steps,
        step_breakdowns=step_breakdowns,
        calls=own,
        seconds={key: seconds_of(calls, active, trace.step_spans) for key, calls in by_key.items()},
        missing=sum(not len(call.rows) for call in own),
        totals=kernels.kernel_totals(trace, found, done, sent),
        strips=timeline_strips(trace, found, active, shown, files),
        has_data_marks=active.data_wait is not None,
        warnings=trace.warnings,
    )
