"""Finds the collectives of one rank: by the operation that launched them, by annotation, and last by name.

1. `record_param_comms`, `c10d::*`, `_c10d_functional::*`, `symm_mem::*`: the correlation id (or torch's External id)
   leads to the device rows that they launched, of any kind; over gloo, to the range `gloo:*` on its threads.
2. Quadriga's annotations (`quadriga:collective ...`), for calls that torch does not describe: all rows within them.
3. Kernels without a launch in the trace: by their names, and marked as such.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quadriga.analysis.trace.describe import (
    ANNOTATION_PREFIX,
    COLLECTIVE_NAMES,
    UNKNOWN,
    CallInfo,
    axis_of,
    info_of_annotation,
    info_of_operation,
    item_bytes,
    kind_of,
)
from quadriga.analysis.trace.fields import numel
from quadriga.analysis.trace.intervals import EMPTY, Spans, union, window_index
from quadriga.analysis.trace.metadata import ProcessGroup
from quadriga.analysis.trace.read import KERNEL, RankTrace

LINKAGE, ANNOTATION, NAME = "linkage", "annotation", "name"
# Operations that multiply and communicate in one: only their copies are communication.
FUSED_OPERATIONS = ("matmul", "_mm")
ANNOTATIONS = re.compile(rf"^{ANNOTATION_PREFIX}")
GLOO_RANGE = re.compile(r"^gloo:")
GLOO_WAIT = re.compile(r"^_?c10d_functional::wait_tensor$")
IMPLEMENTED_BY = {"reduce_scatter": "all_reduce"}  # gloo implements the first by the second
CLOCK_TOLERANCE = 50e-6  # seconds by which two clocks of one machine may differ within a trace


@dataclass(eq=False)
class Call:
    """One call of a collective. Times in seconds of its trace. `step`: index of the step that launched it; -1: none.

    `rows`: times in which it ran, unsorted: device rows, or ranges on gloo's threads; empty if the trace has none.
    """

    info: CallInfo
    found_by: str
    launched: float
    returned: float
    thread: int
    step: int = -1
    rows: Spans = field(default_factory=lambda: EMPTY)

    @property
    def axis(self) -> str:
        return self.info.axis or UNKNOWN

    @property
    def start(self) -> float:
        return float(self.rows[:, 0].min())

    @property
    def end(self) -> float:
        return float(self.rows[:, 1].max())


@dataclass(frozen=True)
class RankCalls:
    """`owned`: for each device row, whether it belongs to a call. `waits`: union of the time in which a host thread
    waited for a call, as far as operations show it."""

    calls: list[Call]
    owned: NDArray[np.bool_]
    waits: Spans


def find_calls(trace: RankTrace) -> RankCalls:
    """All calls of the trace, in the order of their launch."""
    calls, inner = _launched(trace)
    owned = np.zeros(len(trace.device), dtype=bool)
    if trace.on_device:
        _follow(trace, calls, inner, owned)
        calls += _by_recorded_args(trace, owned)
        calls += _by_name(trace, owned)
    else:
        for call in calls:
            if call.found_by == ANNOTATION:  # without a device, the call runs within the annotation
                call.rows = np.array([[call.launched, call.returned]])
    _assign_groups(trace, calls)
    _match_gloo_ranges(trace, calls)
    for call in calls:
        call.info.backend = call.info.backend or trace.metadata.backend or UNKNOWN
    steps = window_index(np.array([call.launched for call in calls]), trace.step_spans)
    for call, step in zip(calls, steps.tolist(), strict=True):
        call.step = step
    calls.sort(key=lambda call: call.launched)
    # On a GPU the device waits, and not the host in `wait_tensor`.
    waits = EMPTY if trace.on_device else union(trace.ops.spans(trace.is_named(trace.ops, GLOO_WAIT)))
    return RankCalls(calls, owned, waits)


# --- operations of the host ------------------------------------------------------------------------------------------


def _launched(trace: RankTrace) -> tuple[list[Call], list[list[int]]]:
    """The calls and their operations. Of nested operations the outermost is the call; the others add information."""
    ops = trace.ops
    calls: list[Call] = []
    inner: list[list[int]] = []
    annotations = np.flatnonzero(trace.is_named(ops, ANNOTATIONS))
    for at in ops.nested_order(np.union1d(np.array(sorted(ops.args), dtype=np.int64), annotations)):
        name = trace.names[ops.name[at]]
        info = info_of_annotation(name) if name.startswith(ANNOTATION_PREFIX) else info_of_operation(name, ops.args[at])
        if info is None or name.startswith("gloo:"):
            continue
        last = calls[-1] if calls else None
        if last is not None and last.thread == ops.thread[at] and ops.start[at] < last.returned:
            last.info.fill(info)
            inner[-1].append(int(at))
        else:
            found_by = ANNOTATION if name.startswith(ANNOTATION_PREFIX) else LINKAGE
            calls.append(Call(info, found_by, float(ops.start[at]), float(ops.end[at]), int(ops.thread[at])))
            inner.append([int(at)])
    return calls, inner


def _follow(trace: RankTrace, calls: list[Call], inner: list[list[int]], owned: NDArray[np.bool_]) -> None:
    """Assign to each call the device rows that it launched."""
    ops, device = trace.ops, trace.device
    by_correlation, by_link = _index(device.correlation), _index(device.link)
    is_plain = [name.startswith("aten::") for name in trace.names]
    plain = {link: is_plain[name] for link, name in zip(ops.link.tolist(), ops.name.tolist(), strict=True)}
    launches = _Launches(trace)
    for call, within in zip(calls, inner, strict=True):
        fused = any(word in trace.names[ops.name[at]] for at in within for word in FUSED_OPERATIONS)
        recorded = [at for at in within if trace.names[ops.name[at]] == "record_param_comms"]
        rows: set[int] = set()
        for correlation in launches.during(call.thread, union(ops.spans(np.array(recorded or within[:1])))):
            rows.update(by_correlation.get(correlation, ()))
        for link in {int(ops.link[at]) for at in recorded or within}:
            rows.update(by_link.get(link, ()))
        if call.found_by == LINKAGE and not recorded:  # copies that torch makes around the call do not count
            rows = {row for row in rows if not plain.get(int(device.link[row]), False)}
        if fused:
            rows = {row for row in rows if device.category[row] != KERNEL}
        chosen = np.array(sorted(row for row in rows if not owned[row]), dtype=np.int64)
        owned[chosen] = True
        call.rows = device.spans(chosen)


class _Launches:
    """Correlation ids of the launches of each thread, by time."""

    def __init__(self, trace: RankTrace) -> None:
        rows = trace.launches
        order = np.lexsort((rows.start, rows.thread))
        threads, begins = np.unique(rows.thread[order], return_index=True)
        ends = [*begins[1:].tolist(), len(order)]
        self._by_thread = {
            thread: (rows.start[order[begin:end]], rows.correlation[order[begin:end]])
            for thread, begin, end in zip(threads.tolist(), begins.tolist(), ends, strict=True)
        }

    def during(self, thread: int, times: Spans) -> set[int]:
        """The nonzero correlation ids of the launches of a thread within a union of times."""
        starts, correlations = self._by_thread.get(thread, (np.empty(0), np.empty(0, np.int64)))
        first, last = (np.searchsorted(starts, times[:, side]) for side in (0, 1))
        found = {each for begin, end in zip(first, last, strict=True) for each in correlations[begin:end].tolist()}
        return found - {0}


def _index(values: NDArray[np.int64]) -> dict[int, list[int]]:
    """Rows by value, without value 0."""
    found: dict[int, list[int]] = {}
    for row, value in enumerate(values.tolist()):
        if value:
            found.setdefault(value, []).append(row)
    return found


# --- rows of the device that no operation explains -------------------------------------------------------------------


def _by_recorded_args(trace: RankTrace, owned: NDArray[np.bool_]) -> Iterator[Call]:
    """Calls from device rows to which Kineto has copied the arguments of record_param_comms."""
    for row, args in trace.device.args.items():
        info = info_of_operation(trace.names[trace.device.name[row]], args)
        if info is not None and not owned[row]:
            owned[row] = True
            yield _of_row(trace, row, info, LINKAGE)


def _by_name(trace: RankTrace, owned: NDArray[np.bool_]) -> Iterator[Call]:
    device = trace.device
    for row in np.flatnonzero(trace.is_named(device, COLLECTIVE_NAMES) & ~owned & (device.category == KERNEL)):
        owned[row] = True
        kind = kind_of(trace.names[device.name[row]]) or UNKNOWN
        yield _of_row(trace, int(row), CallInfo(kind), NAME)


def _of_row(trace: RankTrace, row: int, info: CallInfo, found_by: str) -> Call:
    start, end = float(trace.device.start[row]), float(trace.device.end[row])
    return Call(info, found_by, start, start, -1, rows=np.array([[start, end]]))


# --- groups and steps ------------------------------------------------------------------------------------------------


def _assign_groups(trace: RankTrace, calls: list[Call]) -> None:
    """Assign group and axis to each call."""
    _apply_notes(trace, calls)
    groups, notes = trace.metadata.groups, trace.metadata.notes
    for call in calls:
        info = call.info
        group = groups.get(info.group or "") or ProcessGroup(info.purpose or "", info.ranks)
        info.ranks = info.ranks or group.ranks
        info.group_size = info.group_size or len(info.ranks) or None
        if info.axis is None and info.group is not None:
            info.axis = notes.axes.get(info.group) or axis_of(group.purpose or info.purpose or "")
        if info.axis is None and info.kind in ("send", "recv"):
            info.axis = notes.messages


def _apply_notes(trace: RankTrace, calls: list[Call]) -> None:
    """Assign groups from the notes to calls whose group torch did not record, by their start time."""
    launches = trace.metadata.notes.launches
    if not launches or trace.origin_ns is None:
        return
    open_calls = sorted((call for call in calls if call.info.group is None), key=lambda call: call.launched)
    starts = np.array([call.launched for call in open_calls])
    for moment, group, sequence in launches:
        at = (moment - trace.origin_ns) * 1e-9
        place = int(np.searchsorted(starts, at, "right")) - 1
        near = [open_calls[each] for each in (place, place + 1) if 0 <= each < len(open_calls)]
        fitting = [call for call in near if call.launched - CLOCK_TOLERANCE <= at <= call.returned + CLOCK_TOLERANCE]
        call = next((call for call in fitting if call.info.group is None), None)
        if call is not None:
            call.info.group, call.info.sequence = group, sequence


# --- ranges `gloo:*` on gloo's own threads ---------------------------------------------------------------------------


def _match_gloo_ranges(trace: RankTrace, calls: list[Call]) -> None:
    """Assign to each call over gloo the range in which it ran. The trace does not show which call started a range.

    Each group has its own threads, and starts its calls in order. So the range of a call is the next one of its kind
    and size on the threads of its group. A first pass over all calls assigns each thread to a group, by majority.
    """
    ranges = _GlooRanges(trace)
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


class _GlooRanges:
    """Ranges `gloo:*` in the order of their start."""

    def __init__(self, trace: RankTrace) -> None:
        self._trace = trace
        found = np.flatnonzero(trace.is_named(trace.ops, GLOO_RANGE))
        self.at = found[np.argsort(trace.ops.start[found], kind="stable")]
        self._keys = [self._key(int(at)) for at in self.at]

    def assign(self, calls: list[Call], groups: dict[int, str | None] | None) -> list[tuple[int, Call]]:
        """Pairs of (index of a range, its call). Of equal calls, the earliest comes first. `groups`: by thread."""
        queues: dict[tuple[object, ...], deque[Call]] = defaultdict(deque)
        for call in sorted(calls, key=lambda call: call.launched):
            group = None if groups is None else call.info.group
            queues[group, call.info.kind, call.info.inputs or 0].append(call)
        pairs = []
        for place, (kind, count) in enumerate(self._keys):
            group = None if groups is None else groups.get(self.thread(place))
            start = self._trace.ops.start[self.at[place]]
            names = [kind, *(own for own, other in IMPLEMENTED_BY.items() if other == kind)]
            waiting = [queue for name in names if (queue := queues.get((group, name, count)))]
            if heads := [queue for queue in waiting if queue[0].launched <= start]:
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
