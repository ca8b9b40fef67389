"""Matches ranges `gloo:*` on gloo's own threads with calls. The trace does not show which call started a range.

Each group has its own threads, and starts its calls in order. So the range of a call is the next one of its kind and
size on the threads of its group. A first pass over all calls assigns each thread to a group, by majority.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from typing import TYPE_CHECKING

import numpy as np

from quadriga.analysis.trace.describe import item_bytes, kind_of
from quadriga.analysis.trace.fields import numel
from quadriga.analysis.trace.intervals import Spans, union
from quadriga.analysis.trace.read import RankTrace

if TYPE_CHECKING:
    from quadriga.analysis.trace.calls import Call

RANGE = re.compile(r"gloo:")
WAIT = re.compile(r"_?c10d_functional::wait_tensor$")
IMPLEMENTED_BY = {"reduce_scatter": "all_reduce"}  # gloo implements the first by the second


def match_ranges(trace: RankTrace, calls: list[Call]) -> None:
    """Assign to each call over gloo the range in which it ran. Groups must already be assigned to calls."""
    ranges = _Ranges(trace)
    waiting = [call for call in calls if not len(call.rows)]
    if not len(ranges.at) or not waiting:
        return
    owners: dict[int, Counter[str | None]] = defaultdict(Counter)
    for place, call in ranges.assign(waiting, None):
        owners[ranges.thread(place)][call.info.group] += 1
    groups = {thread: votes.most_common(1)[0][0] for thread, votes in owners.items()}
    for place, call in ranges.assign(waiting, groups):
        at = ranges.at[place]
        call.rows = trace.ops.spans(np.array([at]))
        call.info.item = call.info.item or ranges.item(at)
        call.info.backend = "gloo"


def threads(trace: RankTrace) -> set[int]:
    """The threads of gloo, on which no step is marked."""
    return set(trace.ops.thread[_Ranges(trace).at].tolist()) - {step.thread for step in trace.steps}


def wait_spans(trace: RankTrace) -> Spans:
    """Union of the time in which the host waits in `wait_tensor`. Empty on a GPU, where the device waits."""
    if trace.on_device:
        return union()
    return union(trace.ops.spans(np.isin(trace.ops.name, trace.named(WAIT))))


class _Ranges:
    """Ranges `gloo:*` in the order of their start."""

    def __init__(self, trace: RankTrace) -> None:
        self._trace = trace
        found = np.flatnonzero(np.isin(trace.ops.name, trace.named(RANGE)))
        self.at = found[np.argsort(trace.ops.start[found], kind="stable")]
        self._keys = [self._key(int(at)) for at in self.at]

    def assign(self, calls: list[Call], groups: dict[int, str | None] | None) -> list[tuple[int, Call]]:
        """Pairs of (index of a range, its call). Of equal calls, the earliest comes first. `groups`: by thread."""
        queues: dict[tuple[object, ...], deque[Call]] = defaultdict(deque)
        for call in sorted(calls, key=lambda call: call.launched):
            info = call.info
            key = (info.group if groups is not None else None, info.kind, info.inputs or 0)
            queues[key].append(call)
        pairs = []
        for place, (kind, count) in enumerate(self._keys):
            group = groups.get(self.thread(place)) if groups is not None else None
            start = self._trace.ops.start[self.at[place]]
            names = [kind, *(own for own, other in IMPLEMENTED_BY.items() if other == kind)]
            heads = [
                queue for name in names if (queue := queues.get((group, name, count))) and queue[0].launched <= start
            ]
            if heads:
                pairs.append((place, min(heads, key=lambda queue: queue[0].launched).popleft()))
        return pairs

    def thread(self, place: int) -> int:
        return int(self._trace.ops.thread[self.at[place]])

    def item(self, at: int) -> int | None:
        types = self._trace.ops.args[at].get("Input type") or ("",)
        return item_bytes(str(types[0]))

    def _key(self, at: int) -> tuple[str, int]:
        name = self._trace.names[self._trace.ops.name[at]]
        dims = self._trace.ops.args[at].get("Input Dims") or ()
        kind = kind_of(name.removeprefix("gloo:")) or name
        return kind, numel(dims[0]) if dims and kind != "barrier" else 0
