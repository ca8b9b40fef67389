"""The time of each step of one rank, by part. docs/traces.md defines every figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from quadriga.analysis.trace.calls import Call, RankCalls
from quadriga.analysis.trace.host import HostWork
from quadriga.analysis.trace.intervals import Spans, clip, intersection, subtract, total_length, union
from quadriga.analysis.trace.read import KERNEL, RankTrace
from quadriga.analysis.trace.steps import Step

DATA_WAIT = ("quadriga:data_wait", "enumerate(DataLoader)#")
HOST_AXIS = "host"  # groups that serve the host: saves and stop requests, for which no step waits
Breakdown = Mapping[str, float | None]


@dataclass(frozen=True)
class DeviceActivity:
    """Unions of time of one rank. `communication` None: the run has several ranks, and no call was identified.
    `data_wait` None: the trace has no mark of it. `memcpy` None: there is no device."""

    compute: Spans
    communication: Spans | None
    memcpy: Spans | None
    data_wait: Spans | None
    on_device: bool


def device_activity(trace: RankTrace, found: RankCalls, work: HostWork, single_rank: bool) -> DeviceActivity:
    """`single_rank`: the run has one rank, so finding no call means that there is no communication."""
    marks = [number for number, name in enumerate(trace.names) if name.startswith(DATA_WAIT)]
    calls = without_host_calls(found.calls)
    known = bool(calls) or single_rank
    waited = union(trace.ops.spans(np.isin(trace.ops.name, marks)))
    computes, copies = (
        ~found.owned & (trace.device.category == KERNEL),
        ~found.owned & (trace.device.category != KERNEL),
    )
    return DeviceActivity(
        compute=union(trace.device.spans(computes)) if trace.on_device else work.spans,
        communication=union(found.waits, *(call.rows for call in calls)) if known else None,
        memcpy=union(trace.device.spans(copies)) if trace.on_device else None,
        data_wait=waited if marks else None,
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
    result: dict[str, float | None] = {}
    for name in steps[0]:
        values = [value for step in steps if (value := step[name]) is not None]
        result[name] = sum(values) / len(values) if values else None
    return result


def seconds_of(calls: list[Call], found: DeviceActivity, steps: tuple[Step, ...]) -> tuple[float, float]:
    """Seconds per step in which one of the calls ran, and in which nothing computed during that time."""
    ran = union(*(call.rows for call in calls))
    windows = np.array([[step.start, step.end] for step in steps])
    inside = intersection(ran, union(windows))
    return total_length(inside) / len(steps), total_length(subtract(inside, found.compute)) / len(steps)
