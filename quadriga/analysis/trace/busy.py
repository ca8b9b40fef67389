"""Seconds of a profiled step of one rank by kind of work, for the rates of an estimate: matrix products, attention, the
optimizer's update, collectives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.analysis.trace.read import KERNEL, MEMCPY, STEP_MARK, EventTable, RankTrace, read_trace
from quadriga.errors import Problem, UserError, shortened

PATTERNS = {
    "update": re.compile(r"Optimizer\.step#|_fused_adam|_foreach_norm|_foreach_mul_", re.IGNORECASE),
    "collectives": re.compile(r"nccl|gloo:|c10d::", re.IGNORECASE),
    "attention": re.compile(r"attention|flash_|fmha", re.IGNORECASE),
    "products": re.compile(r"aten::(mm|addmm|bmm|_scaled_mm)$|gemm|cutlass|sm\d+_xmma|nvjet", re.IGNORECASE),
}
BACKWARD = re.compile(r"autograd::engine::evaluate_function")


def busy_seconds(path: Path) -> dict[str, Any]:
    """Means over the profiled steps, in seconds: `step`, one figure for each of PATTERNS, and `forward_products` and
    `forward_attention` outside of the backward pass (None if the trace does not show this, as on a GPU).

    Of nested events of a kind, the outermost counts. Raises UserError if there is no trace or no mark of a step.
    """
    trace = read_trace(path, 0)
    if not any(STEP_MARK.match(name) for name in trace.names):
        raise UserError(Problem(shortened(path, 400), "the trace has no marks of steps"))
    count = len(trace.steps)
    rows = trace.device if trace.on_device else trace.ops
    chosen = np.isin(rows.category, (KERNEL, MEMCPY)) if trace.on_device else np.ones(len(rows), dtype=bool)
    found: dict[str, Any] = {"step": sum(step.seconds for step in trace.steps) / count}
    for kind, pattern in PATTERNS.items():
        found[kind] = _sum(rows, np.flatnonzero(chosen & _named(trace, rows, pattern))) / count
    outside = np.empty(0, dtype=np.intp) if trace.on_device else _outside(rows, _named(trace, rows, BACKWARD))
    for kind in ("products", "attention"):
        forward = outside[_named(trace, rows, PATTERNS[kind])[outside]]
        found[f"forward_{kind}"] = _sum(rows, forward) / count if len(forward) else None
    return found


def _named(trace: RankTrace, rows: EventTable, pattern: re.Pattern[str]) -> NDArray[np.bool_]:
    names = [number for number, name in enumerate(trace.names) if pattern.search(name)]
    return np.isin(rows.name, names)


def _ordered(rows: EventTable, places: NDArray[np.intp]) -> NDArray[np.intp]:
    """Rows by thread and start, longer ones first."""
    return places[np.lexsort((-rows.end[places], rows.start[places], rows.thread[places]))]


def _sum(rows: EventTable, places: NDArray[np.intp]) -> float:
    """Seconds of the rows that are not within another one of their thread."""
    total, thread, end = 0.0, -1, 0.0
    for at in _ordered(rows, places).tolist():
        if rows.thread[at] != thread:
            thread, end = int(rows.thread[at]), -1.0
        if rows.start[at] >= end:
            end = float(rows.end[at])
            total += end - float(rows.start[at])
    return total


def _outside(rows: EventTable, marks: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Rows that are not marks and are not within a mark on their thread."""
    found, thread, end = [], -1, -1.0
    for at in _ordered(rows, np.arange(len(rows))).tolist():
        if rows.thread[at] != thread:
            thread, end = int(rows.thread[at]), -1.0
        if rows.start[at] < end:
            continue
        if marks[at]:
            end = float(rows.end[at])
        else:
            found.append(at)
    return np.array(found, dtype=np.intp)
