"""The analysis of one rank's trace, from which the analysis of all ranks is built."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from quadriga.analysis.trace import breakdown, kernels, timeline
from quadriga.analysis.trace.calls import Call, find_calls
from quadriga.analysis.trace.host import host_work
from quadriga.analysis.trace.read import read_trace
from quadriga.analysis.trace.steps import Step

CallKey = tuple[str, str, str, str, int | None]  # axis, collective, backend, found by, ranks of the group


@dataclass(frozen=True)
class RankResult:
    """`seconds`: per step, by kind of call: time in which it ran, and the part in which nothing computed. `missing`:
    calls without a row on the device or a range on gloo's threads. `axis_aliases`: other names of axes that share a
    group. `attempt`: the start of the run that made the trace, if known. `origin_ns`: time 0 in ns since 1970."""

    rank: int
    world_size: int | None
    machine: str | None
    origin_ns: int | None
    on_device: bool
    steps: tuple[Step, ...]
    step_breakdowns: list[dict[str, float | None]]
    calls: list[Call]
    seconds: dict[CallKey, tuple[float, float]]
    missing: int
    totals: kernels.KernelTotals
    strips: dict[str, list[timeline.Span]]
    has_data_marks: bool
    axis_aliases: dict[str, str]
    attempt: int | None
    warnings: list[str]


def key_of(call: Call) -> CallKey:
    return call.axis, call.info.kind, call.info.backend or "?", call.found_by, call.info.group_size


def analyse_rank(path: Path, rank: int | None, files: int) -> RankResult:
    """Read and analyse one file. `rank`: used if the file has none. `files`: number of files in the set."""
    trace = read_trace(path, rank)
    found = find_calls(trace)
    done = host_work(trace, found)
    single_rank = (trace.world_size or files) == 1 and (trace.world_size is not None)
    active = breakdown.device_activity(trace, found, done, single_rank)
    own = [call for call in found.calls if call.step >= 0]
    by_key: dict[CallKey, list[Call]] = defaultdict(list)
    for call in own:
        by_key[key_of(call)].append(call)
    seconds = {key: breakdown.seconds_of(calls, active, trace.steps) for key, calls in by_key.items()}
    step_breakdowns = [breakdown.step_breakdown(active, step) for step in trace.steps]
    sent = sum(each["communication_s"] or 0.0 for each in step_breakdowns)
    shown = trace.steps[len(trace.steps) // 2]
    return RankResult(
        rank=trace.rank,
        world_size=trace.world_size,
        machine=trace.machine,
        origin_ns=trace.origin_ns,
        on_device=trace.on_device,
        steps=trace.steps,
        step_breakdowns=step_breakdowns,
        calls=own,
        seconds=seconds,
        missing=sum(not len(call.rows) for call in own),
        totals=kernels.kernel_totals(trace, found, done, sent),
        strips=timeline.timeline_strips(trace, found, active, shown, files),
        has_data_marks=active.data_wait is not None,
        axis_aliases=dict(trace.notes.axis_aliases),
        attempt=trace.notes.attempt,
        warnings=trace.warnings,
    )
