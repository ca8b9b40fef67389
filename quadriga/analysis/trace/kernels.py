"""Computing time: the work of the host if it is the device, and totals by family of kernels, by block and by name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.analysis.trace.calls import GLOO_RANGE, RankCalls
from quadriga.analysis.trace.intervals import EMPTY, Spans, make_spans, subtract, union, window_index
from quadriga.analysis.trace.read import HOST_CATEGORIES, RankTrace

# Namespaces of operations that move tensors between ranks, or only contain others.
C10D = ("c10d", "_c10d_functional", "c10d_functional", "_c10d_functional_autograd")
NO_WORK_NAMESPACES = (*C10D, "autograd", "symm_mem", "profiler")
COMPILED = ("## Call CompiledFxGraph", "Torch-Compiled Region", "CompiledFunction")
# A tensor subclass (DTensor) handles the operation: the time around it is Python, and the work is within it.
SUBCLASS = "PythonSubclass"
BACKWARD = re.compile(r"^autograd::engine::")


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
    threads = {*(step.thread for step in trace.steps), *ops.thread[trace.is_named(ops, BACKWARD)].tolist()}
    # Ranges of gloo on these threads (messages) end when the message has arrived, so nothing is nested in them.
    chosen = np.isin(ops.thread, list(threads)) & ~trace.is_named(ops, GLOO_RANGE)
    rows = ops.nested_order(np.flatnonzero(chosen))
    is_work = np.array([_is_work(name) for name in names], dtype=bool)
    subclass = names.index(SUBCLASS) if SUBCLASS in names else -1
    own, outer = _own_seconds(trace, rows, subclass)
    computes = is_work[ops.name[rows]] & ~outer & (ops.category[rows] == HOST_CATEGORIES["cpu_op"])
    calling = make_spans([call.launched for call in found.calls], [call.returned for call in found.calls])
    rows = rows[computes]
    return HostWork(subtract(union(ops.spans(rows)), union(calling, found.waits)), rows, own[computes])


def _is_work(name: str) -> bool:
    namespace, colons, _ = name.partition("::")
    return (bool(colons) and namespace not in NO_WORK_NAMESPACES) or name.startswith(COMPILED)


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


# --- totals ----------------------------------------------------------------------------------------------------------


# The family of a kernel or an operation is the first whose pattern matches its name.
FAMILIES = {
    "attention": r"attention|flash|fmha|sdpa",
    "matrix products": r"gemm|cutlass|xmma|nvjet|cublas|aten::(mm|addmm|bmm|baddbmm|_scaled_mm|linear)$|matmul",
    "optimizer": r"adam|sgd|multi_tensor|_foreach_",
    "loss": r"softmax|nll_loss|cross_entropy|logsumexp",
    "norms": r"rms_?norm|layer_?norm|batch_?norm",
    "embedding and indexing": r"embedding|index|gather|scatter",
    "copies and casts": r"copy|memcpy|memset|cat_?array|::cat$|::stack$|::clone$|fill|zero|cast|chunk_cat|::to$",
    "compiled": r"triton|CompiledFxGraph|CompiledFunction|Torch-Compiled|inductor",
    "reductions": r"reduce|::(sum|mean|max|min|amax|norm|linalg_vector_norm)$",
    "elementwise": r"elementwise|::\w*(add|sub|mul|div|pow|silu|gelu|exp|log|neg|sin|cos|rsqrt|where)\w*$",
}
OTHER = "other"
COMMUNICATION = "communication"
OUTSIDE = "outside of blocks"
OPTIMIZER = re.compile(r"Optimizer\.step#")
UNIT = re.compile(r"FSDP::(pre_forward|post_forward|pre_backward|post_backward)\w* ?\((.+)\)$")
OPENS, CLOSES = {"pre_forward": "post_forward", "pre_backward": "post_backward"}, ("post_forward", "post_backward")
TOP = 200  # names per rank in the result


@dataclass(frozen=True)
class KernelTotals:
    """Seconds over all steps of one rank. `blocks` None: the trace has no marks of blocks."""

    families: Mapping[str, float]
    blocks: Mapping[str, float] | None
    names: Mapping[str, tuple[float, int]]  # seconds, count


@dataclass(frozen=True)
class _WorkItems:
    """For each kernel or operation: index of its name, time of launch, time of start, seconds."""

    name: NDArray[np.int64]
    launched: NDArray[np.float64]
    ran: NDArray[np.float64]
    seconds: NDArray[np.float64]


def kernel_totals(trace: RankTrace, found: RankCalls, work: HostWork, sent_seconds: float) -> KernelTotals:
    """Totals of one rank. `sent_seconds`: of communication, over all steps."""
    start = trace.ops.start[work.rows]
    of_host = _WorkItems(trace.ops.name[work.rows], start, start, work.seconds)
    items = _of_device(trace, found) if trace.on_device else of_host
    kept = window_index(items.ran, trace.step_spans) >= 0
    seconds, counts = np.bincount(items.name[kept], items.seconds[kept]), np.bincount(items.name[kept])
    by_name = {trace.names[at]: (float(seconds[at]), int(counts[at])) for at in np.flatnonzero(counts)}
    families: dict[str, float] = defaultdict(float)
    for name, (taken, _) in by_name.items():
        families[family_of(name)] += taken
    if sent_seconds:
        families[COMMUNICATION] = sent_seconds
    largest = sorted(by_name.items(), key=lambda item: -item[1][0])[:TOP]
    return KernelTotals(dict(families), _blocks(trace, items, kept), dict(largest))


def family_of(name: str) -> str:
    return next((family for family, pattern in FAMILIES.items() if re.search(pattern, name, re.IGNORECASE)), OTHER)


def _of_device(trace: RankTrace, found: RankCalls) -> _WorkItems:
    device, launches = trace.device, trace.launches
    rows = np.flatnonzero(~found.owned)
    launched = device.start[rows].copy()
    order = np.argsort(launches.correlation, kind="stable")
    known = launches.correlation[order]
    if len(known):
        place = np.minimum(np.searchsorted(known, device.correlation[rows]), len(known) - 1)
        linked = (known[place] == device.correlation[rows]) & (device.correlation[rows] != 0)
        launched[linked] = launches.start[order[place[linked]]]
    return _WorkItems(device.name[rows], launched, device.start[rows], device.end[rows] - device.start[rows])


# --- blocks ----------------------------------------------------------------------------------------------------------


def _blocks(trace: RankTrace, items: _WorkItems, kept: NDArray[np.bool_]) -> dict[str, float] | None:
    """Seconds by the block (or unit of FSDP) that launched the work."""
    windows = _windows(trace)
    if not any(label != "optimizer" for _, _, label in windows):
        return None
    cuts, labels = _innermost(windows)
    place = np.searchsorted(cuts, items.launched[kept], "right") - 1
    found: dict[str, float] = defaultdict(float)
    seconds = items.seconds[kept]
    for number in np.unique(place):
        found[labels[number] if number >= 0 else OUTSIDE] += float(seconds[place == number].sum())
    return dict(found)


def _windows(trace: RankTrace) -> list[tuple[float, float, str]]:
    """(start, end, label): the optimizer's step, and the time between FSDP's marks before and after a unit's passes."""
    marks = {}
    for number, name in enumerate(trace.names):
        if match := UNIT.match(name):
            marks[number] = (match.group(1), match.group(2))
        elif OPTIMIZER.match(name):
            marks[number] = ("whole", "optimizer")
    ops = trace.ops
    places = np.flatnonzero(np.isin(ops.name, list(marks)))
    places = places[np.argsort(ops.start[places], kind="stable")]
    windows: list[tuple[float, float, str]] = []
    opened: dict[tuple[str, str], float] = {}
    for at, (start, end) in zip(places, ops.spans(places).tolist(), strict=True):
        what, unit = marks[int(ops.name[at])]
        if what == "whole":
            windows.append((start, end, unit))
        elif what in OPENS:
            opened[OPENS[what], unit] = start
        elif (what, unit) in opened:
            windows.append((opened.pop((what, unit)), end, unit))
    return windows


def _innermost(windows: list[tuple[float, float, str]]) -> tuple[NDArray[np.float64], list[str]]:
    """The times at which the label changes, and the label after each. In nested windows, the later one counts."""
    open_windows: dict[int, None] = {}
    cuts, labels = [], []
    ends = ((place, start, end) for place, (start, end, _) in enumerate(windows))
    events = sorted((at, opens, place) for place, start, end in ends for at, opens in ((start, 1), (end, 0)))
    for moment, opens, place in events:
        if opens:
            open_windows[place] = None
        else:
            open_windows.pop(place, None)
        cuts.append(moment)
        labels.append(windows[next(reversed(open_windows))][2] if open_windows else OUTSIDE)
    return np.array(cuts), labels
