"""Work of the training threads if the host is the device: which ranges are work, and the time of each without its
nested ranges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.analysis.trace.calls import GLOO_RANGE, RankCalls
from quadriga.analysis.trace.intervals import EMPTY, Spans, subtract, union
from quadriga.analysis.trace.read import HOST_CATEGORIES, RankTrace

# Namespaces of operations that move tensors between ranks, or only contain others.
NO_WORK_NAMESPACES = (
    "autograd",
    "c10d",
    "_c10d_functional",
    "c10d_functional",
    "_c10d_functional_autograd",
    "symm_mem",
    "profiler",
)
COMPILED = ("## Call CompiledFxGraph", "Torch-Compiled Region", "CompiledFunction")
# A tensor subclass (DTensor) handles the operation: the time around it is Python, and the work is within it.
SUBCLASS = "PythonSubclass"


@dataclass(frozen=True)
class HostWork:
    """`spans`: union of the time in which an operation computed. `rows`: those operations. `seconds`: time of each
    without nested ranges."""

    spans: Spans
    rows: NDArray[np.int64]
    seconds: NDArray[np.float64]


def host_work(trace: RankTrace, found: RankCalls) -> HostWork:
    """Work on the threads that mark steps or compute gradients. Empty if the trace has a device."""
    if trace.on_device:
        return HostWork(EMPTY, np.empty(0, dtype=np.int64), np.empty(0))
    ops, names = trace.ops, trace.names
    # Ranges of gloo on these threads (messages) end when the message has arrived, so nothing is nested in them.
    chosen = np.isin(ops.thread, list(_threads(trace))) & ~np.isin(ops.name, trace.named(GLOO_RANGE))
    rows = np.flatnonzero(chosen)
    rows = rows[np.lexsort((-ops.end[rows], ops.start[rows], ops.thread[rows]))]
    is_work = np.array([_is_work(name) for name in names], dtype=bool)
    subclass = trace.names.index(SUBCLASS) if SUBCLASS in names else -1
    own, outer = _own_seconds(trace, rows, subclass)
    computes = is_work[ops.name[rows]] & ~outer & (ops.category[rows] == HOST_CATEGORIES["cpu_op"])
    calling = union(np.array([[call.launched, call.returned] for call in found.calls]).reshape(-1, 2))
    communicating = union(calling, found.waits)
    rows = rows[computes]
    return HostWork(subtract(union(ops.spans(rows)), communicating), rows, own[computes])


def _is_work(name: str) -> bool:
    namespace, colons, _ = name.partition("::")
    return (bool(colons) and namespace not in NO_WORK_NAMESPACES) or name.startswith(COMPILED)


def _threads(trace: RankTrace) -> set[int]:
    backward = [number for number, name in enumerate(trace.names) if name.startswith("autograd::engine::")]
    marked = {step.thread for step in trace.steps}
    return marked | set(trace.ops.thread[np.isin(trace.ops.name, backward)].tolist())


def _own_seconds(
    trace: RankTrace, rows: NDArray[np.int64], subclass: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """For each row: seconds without those of nested ranges, and whether a tensor subclass is nested in it.

    `rows` are sorted by thread and start, longer ones first.
    """
    starts, ends = trace.ops.start[rows].tolist(), trace.ops.end[rows].tolist()
    threads, names = trace.ops.thread[rows].tolist(), trace.ops.name[rows].tolist()
    own = [end - start for start, end in zip(starts, ends, strict=True)]
    outer = [False] * len(rows)
    open_rows: list[int] = []
    thread = None
    for place, start in enumerate(starts):
        if threads[place] != thread:
            thread, open_rows = threads[place], []
        while open_rows and start >= ends[open_rows[-1]]:
            open_rows.pop()
        if open_rows:
            own[open_rows[-1]] -= ends[place] - start
        if names[place] == subclass:
            for each in reversed(open_rows):
                if outer[each]:  # and so are the rows around it
                    break
                outer[each] = True
        open_rows.append(place)
    return np.maximum(np.array(own), 0.0), np.array(outer, dtype=bool)
