"""The collectives of one rank: found by the operation that launched them, then by annotations, by name last.

1. `record_param_comms`, `c10d::*`, `_c10d_functional::*`, `symm_mem::*`: what they launched, followed by correlation
   (or by torch's External id) to rows of the device of any sort; over gloo to the range `gloo:*` on its threads.
2. Quadriga's own annotations (`quadriga:collective ...`), which describe what torch does not, with all rows within.
3. Kernels that nobody launched as far as the trace says, by their names; they are marked so.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from quadriga.analysis.trace import gloo
from quadriga.analysis.trace.describe import BY_NAME, OWN, UNKNOWN, Description, axis_of, described, kind_of, own
from quadriga.analysis.trace.intervals import NONE, Spans, inside, union
from quadriga.analysis.trace.metadata import Group
from quadriga.analysis.trace.read import KERNEL, RankTrace

LINKAGE, ANNOTATION, NAME = "linkage", "annotation", "name"
FUSED = ("matmul", "_mm")  # operations that compute and send in one: of them only the copies are communication
SLACK = 50e-6  # seconds by which two clocks of one machine may differ within a trace


@dataclass(eq=False)
class Call:
    """One call of a collective. Times in seconds of its trace. `step`: index of the step it was launched in, -1: none.

    `rows`: where it ran, unsorted: rows of the device, or ranges on gloo's threads; empty where the trace has none.
    """

    about: Description
    found_by: str
    launched: float
    returned: float
    thread: int
    step: int = -1
    rows: Spans = field(default_factory=lambda: NONE)

    @property
    def axis(self) -> str:
        return self.about.axis or UNKNOWN

    @property
    def start(self) -> float:
        return float(self.rows[:, 0].min())

    @property
    def end(self) -> float:
        return float(self.rows[:, 1].max())


@dataclass(frozen=True)
class Found:
    """`owned`: by row of the device, whether it belongs to a call. `waits`: a union of time in which a thread of the
    host waited for a call, as far as an operation says so."""

    calls: list[Call]
    owned: NDArray[np.bool_]
    waits: Spans


def find_calls(trace: RankTrace) -> Found:
    """All calls of the trace, in the order of their launch."""
    calls, inner = _launched(trace)
    owned = np.zeros(len(trace.device), dtype=bool)
    if trace.on_device:
        _follow(trace, calls, inner, owned)
        calls += _by_words(trace, owned)
        calls += _by_name(trace, owned)
    else:
        for call in calls:
            if call.found_by == ANNOTATION:  # without a device the call runs where it is made
                call.rows = np.array([[call.launched, call.returned]])
    _tell_groups(trace, calls)
    gloo.match(trace, calls)
    for call in calls:
        call.about.backend = call.about.backend or trace.backend or UNKNOWN
    _tell_steps(trace, calls)
    calls.sort(key=lambda call: call.launched)
    return Found(calls, owned, gloo.waits(trace))


# --- operations of the host ------------------------------------------------------------------------------------------


def _launched(trace: RankTrace) -> tuple[list[Call], list[list[int]]]:
    """Of operations within each other the outermost is the call, and the others tell more of it: their rows."""
    ops = trace.ops
    calls: list[Call] = []
    inner: list[list[int]] = []
    annotations = [number for number, name in enumerate(trace.names) if name.startswith(OWN)]
    candidates = np.union1d(np.array(sorted(ops.told), dtype=np.int64), np.flatnonzero(np.isin(ops.name, annotations)))
    order = candidates[np.lexsort((-ops.end[candidates], ops.start[candidates], ops.thread[candidates]))]
    for at in order:
        name = trace.names[ops.name[at]]
        about = own(name) if name.startswith(OWN) else described(name, ops.told[at])
        if about is None or name.startswith("gloo:"):
            continue
        last = calls[-1] if calls else None
        if last is not None and last.thread == ops.thread[at] and ops.start[at] < last.returned:
            last.about.fill(about)
            inner[-1].append(int(at))
        else:
            found_by = ANNOTATION if name.startswith(OWN) else LINKAGE
            calls.append(Call(about, found_by, float(ops.start[at]), float(ops.end[at]), int(ops.thread[at])))
            inner.append([int(at)])
    return calls, inner


def _follow(trace: RankTrace, calls: list[Call], inner: list[list[int]], owned: NDArray[np.bool_]) -> None:
    """Give each call the rows of the device that it launched."""
    ops, device = trace.ops, trace.device
    by_correlation, by_link = _index(device.correlation), _index(device.link)
    is_plain = [name.startswith("aten::") for name in trace.names]
    plain = {link: is_plain[name] for link, name in zip(ops.link.tolist(), ops.name.tolist(), strict=True)}
    launches = _Launches(trace)
    for call, within in zip(calls, inner, strict=True):
        fused = any(word in trace.names[ops.name[at]] for at in within for word in FUSED)
        told = [at for at in within if trace.names[ops.name[at]] == "record_param_comms"]
        rows: set[int] = set()
        for correlation in launches.during(call.thread, union(ops.spans(np.array(told or within[:1])))):
            rows.update(by_correlation.get(correlation, ()))
        for link in {int(ops.link[at]) for at in told or within}:
            rows.update(by_link.get(link, ()))
        if call.found_by == LINKAGE and not told:  # a copy that torch makes around the call is no part of it
            rows = {row for row in rows if not plain.get(int(device.link[row]), False)}
        if fused:
            rows = {row for row in rows if device.sort[row] != KERNEL}
        chosen = np.array(sorted(row for row in rows if not owned[row]), dtype=np.int64)
        owned[chosen] = True
        call.rows = device.spans(chosen)


class _Launches:
    """Correlations of what each thread launched, by time."""

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
        """Those that are not 0, of what the thread launched in a union of times."""
        starts, correlations = self._by_thread.get(thread, (np.empty(0), np.empty(0, np.int64)))
        first, last = (np.searchsorted(starts, times[:, side]) for side in (0, 1))
        found = {each for begin, end in zip(first, last, strict=True) for each in correlations[begin:end].tolist()}
        return found - {0}


def _index(values: NDArray[np.int64]) -> dict[int, list[int]]:
    """Rows by a number that is not 0."""
    found: dict[int, list[int]] = {}
    for row, value in enumerate(values.tolist()):
        if value:
            found.setdefault(value, []).append(row)
    return found


# --- rows of the device that no operation explains -------------------------------------------------------------------


def _by_words(trace: RankTrace, owned: NDArray[np.bool_]) -> Iterator[Call]:
    """Rows to which Kineto itself has copied what record_param_comms said."""
    for row, told in trace.device.told.items():
        about = described(trace.names[trace.device.name[row]], told)
        if about is not None and not owned[row]:
            owned[row] = True
            yield _of_row(trace, row, about, LINKAGE)


def _by_name(trace: RankTrace, owned: NDArray[np.bool_]) -> Iterator[Call]:
    suspects = [number for number, name in enumerate(trace.names) if BY_NAME.search(name)]
    device = trace.device
    for row in np.flatnonzero(np.isin(device.name, suspects) & ~owned & (device.sort == KERNEL)):
        owned[row] = True
        kind = kind_of(trace.names[device.name[row]]) or UNKNOWN
        yield _of_row(trace, int(row), Description(kind), NAME)


def _of_row(trace: RankTrace, row: int, about: Description, found_by: str) -> Call:
    start, end = float(trace.device.start[row]), float(trace.device.end[row])
    return Call(about, found_by, start, start, -1, rows=np.array([[start, end]]))


# --- groups and steps ------------------------------------------------------------------------------------------------


def _tell_groups(trace: RankTrace, calls: list[Call]) -> None:
    """Which group, and so which axis, each call belongs to."""
    _heed_notes(trace, calls)
    axes = trace.notes.axes
    for call in calls:
        about = call.about
        group = trace.groups.get(about.group or "") or Group(about.group or "", about.purpose or "", about.ranks)
        about.ranks = about.ranks or group.ranks
        about.group_size = about.group_size or len(about.ranks) or None
        if about.axis is None and about.group is not None:
            about.axis = axes.get(about.group) or axis_of(group.purpose or about.purpose or "")
        if about.axis is None and about.kind in ("send", "recv"):
            about.axis = trace.notes.messages


def _heed_notes(trace: RankTrace, calls: list[Call]) -> None:
    """Calls whose group torch did not write get it from the notes: by the moment at which they began."""
    launches = trace.notes.launches
    if not launches or trace.origin_ns is None:
        return
    open_calls = sorted((call for call in calls if call.about.group is None), key=lambda call: call.launched)
    starts = np.array([call.launched for call in open_calls])
    for moment, group, sequence in launches:
        at = (moment - trace.origin_ns) * 1e-9
        place = int(np.searchsorted(starts, at, "right")) - 1
        near = [open_calls[each] for each in (place, place + 1) if 0 <= each < len(open_calls)]
        fitting = [call for call in near if call.launched - SLACK <= at <= call.returned + SLACK]
        call = next((call for call in fitting if call.about.group is None), None)
        if call is not None:
            call.about.group, call.about.sequence = group, sequence


def _tell_steps(trace: RankTrace, calls: list[Call]) -> None:
    windows = np.array([[step.start, step.end] for step in trace.steps])
    for call, place in zip(calls, inside(np.array([call.launched for call in calls]), windows).tolist(), strict=True):
        call.step = place
