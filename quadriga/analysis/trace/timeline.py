"""The timeline of one step as spans for a chart, merged so that few remain."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from quadriga.analysis.trace.breakdown import DeviceActivity, without_host_calls
from quadriga.analysis.trace.calls import RankCalls
from quadriga.analysis.trace.intervals import EMPTY, Spans, clip, subtract, union
from quadriga.analysis.trace.read import RankTrace
from quadriga.analysis.trace.steps import Step

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
            name = f"{call.axis} {call.info.kind}"
            sent[name].append(call.rows)
    communication = [EMPTY] if active.communication is None else [active.communication]
    waited = EMPTY if active.data_wait is None else active.data_wait
    copies = EMPTY if active.memcpy is None else active.memcpy
    whole = np.array([[step.start, step.end]])
    idle = subtract(subtract(whole, union(active.compute, copies, *communication)), waited)
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
    named = [(name, _without_gaps(clip(spans, step.start, step.end), gap)) for name, spans in sets.items()]
    every = sorted((start, end, name) for name, spans in named for start, end in spans.tolist())
    while True:
        merged = _close(every, gap)
        if len(merged) <= budget:
            return merged
        gap *= 1.5


def _without_gaps(spans: Spans, gap: float) -> Spans:
    """The union with all gaps of at most `gap` seconds closed."""
    if not len(spans):
        return spans
    begins = np.concatenate([[True], spans[1:, 0] - spans[:-1, 1] > gap])
    ends = np.concatenate([begins[1:], [True]])
    return np.column_stack([spans[begins, 0], spans[ends, 1]])


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
