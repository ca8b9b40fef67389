"""Seconds of a profiled step of one rank by kind of work, for the rates of an estimate: matrix products, attention, the
optimizer's update, collectives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.analysis.trace.document import trace_error
from quadriga.analysis.trace.read import KERNEL, MEMCPY, STEP_MARK, EventTable, read_trace

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
        raise trace_error(path, "the trace has no marks of steps", None)
    count = len(trace.steps)
    rows = trace.device if trace.on_device else trace.ops
    chosen = np.isin(rows.category, (KERNEL, MEMCPY)) if trace.on_device else np.ones(len(rows), dtype=bool)
    found: dict[str, Any] = {"step": sum(step.seconds for step in trace.steps) / count}
    for kind, pattern in PATTERNS.items():
        found[kind] = _sum(rows, chosen & trace.is_named(rows, pattern)) / count
    marks = trace.is_named(rows, BACKWARD)
    outside = np.zeros(len(rows), dtype=bool)
    if not trace.on_device:
        outside[_not_within(rows, np.arange(len(rows)), marks)] = True
    for kind in ("products", "attention"):
        forward = outside & ~marks & trace.is_named(rows, PATTERNS[kind])
        found[f"forward_{kind}"] = _sum(rows, forward) / count if forward.any() else None
    return found


def _sum(rows: EventTable, chosen: NDArray[np.bool_]) -> float:
    """Seconds of the chosen rows that are not within another one of their thread."""
    total = 0.0
    for at in _not_within(rows, np.flatnonzero(chosen), chosen):
        total += float(rows.end[at]) - float(rows.start[at])
    return total


def _not_within(rows: EventTable, places: NDArray[np.intp], marks: NDArray[np.bool_]) -> list[int]:
    """The rows that do not begin within an earlier one of `marks` on their thread."""
    found, thread, end = [], -1, -1.0
    for at in rows.nested_order(places).tolist():
        if rows.thread[at] != thread:
            thread, end = int(rows.thread[at]), -1.0
        if rows.start[at] >= end:
            found.append(at)
            end = float(rows.end[at]) if marks[at] else end
    return found
