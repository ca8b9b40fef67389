"""The profiled steps of a rank, from the marks `ProfilerStep#N`.

If several threads mark a step, the mark on the thread with the most operations counts. The time between the last call
of `profiler.step` and the end of profiling is marked too. It has almost no work, and is excluded with a warning.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quadriga import limits
from quadriga.analysis.trace.event_table import EventTable
from quadriga.errors import Problem, UserError, shortened

STEP_MARK = re.compile(r"ProfilerStep#([0-9]{1,15})$")
# The last step is a stub if its work and its time are below these shares of the medians of the other steps.
STUB_WORK, STUB_TIME = 0.1, 0.5


@dataclass(frozen=True)
class Step:
    """One profiled step. `number`: of the run, or of the profiler if the trace has no notes. Times in seconds."""

    number: int
    start: float
    end: float
    thread: int

    @property
    def seconds(self) -> float:
        return self.end - self.start


def steps_of(
    ops: EventTable, launches: EventTable, device: EventTable, names: list[str], path: Path, first: int
) -> tuple[tuple[Step, ...], list[str]]:
    """The steps in order, and warnings about excluded ones. `first`: the run's number of `ProfilerStep#0`.

    Raises UserError if there are too many steps, or the trace has no duration.
    """
    warnings: list[str] = []
    marked = [step for step in _unique_steps(ops, names, first) if step.seconds > 0]
    if len(marked) > limits.TRACE_STEPS:
        what = f"{len(marked):,} profiled steps are in it; at most {limits.TRACE_STEPS:,} are read"
        raise UserError(Problem(shortened(path, 400), what, fix="profile fewer steps"))
    if marked and _is_stub(marked, ops, launches, names):
        stub = marked.pop()
        what = f"the last mark of a step ({_time(stub.seconds)} between the last step and the end of profiling)"
        warnings.append(f"{path.name}: {what} has no work of a step: it is excluded from all figures")
    if marked:
        return tuple(marked), warnings
    ends = [rows.end.max() for rows in (ops, device) if len(rows)]
    whole = float(max(ends, default=0.0))
    if whole <= 0:
        what = "all its events are at the same time"
        raise UserError(Problem(shortened(path, 400), what, fix="profile again"))
    warnings.append(f"{path.name} has no marks of steps (profiler.step was not called): the whole counts as one step")
    thread = int(np.bincount(ops.thread).argmax()) if len(ops) else 0
    return (Step(0, 0.0, whole, thread),), warnings


def _unique_steps(ops: EventTable, names: list[str], first: int) -> list[Step]:
    """Each step once, in the order of starts."""
    matches = {number: int(match.group(1)) for number, name in enumerate(names) if (match := STEP_MARK.match(name))}
    places = np.flatnonzero(np.isin(ops.name, list(matches)))
    work = np.bincount(ops.thread) if len(ops) else np.empty(0, dtype=np.int64)
    by_number: dict[int, list[Step]] = defaultdict(list)
    for at in places:
        number = first + matches[int(ops.name[at])]
        by_number[number].append(Step(number, float(ops.start[at]), float(ops.end[at]), int(ops.thread[at])))
    found: list[Step] = []
    for steps in by_number.values():
        thread = max(steps, key=lambda step: (work[step.thread], -step.start)).thread
        own = sorted((step for step in steps if step.thread == thread), key=lambda step: (step.start, -step.end))
        end = -1.0
        for step in own:  # of nested marks, the outer one
            if step.start >= end:
                found.append(step)
                end = step.end
    return sorted(found, key=lambda step: step.start)


def _is_stub(steps: list[Step], ops: EventTable, launches: EventTable, names: list[str]) -> bool:
    """Whether the last step has almost no work, compared with the others."""
    *others, last = steps
    if not others:
        return False
    usual_time = statistics.median(step.seconds for step in others)
    *counts, done = _work_counts(steps, ops, launches, names)
    usual = statistics.median(counts)
    if usual == 0:  # the trace does not show what the host did
        return last.seconds < STUB_WORK * usual_time
    return done == 0 or (done < STUB_WORK * usual and last.seconds < STUB_TIME * usual_time)


def _work_counts(steps: list[Step], ops: EventTable, launches: EventTable, names: list[str]) -> list[int]:
    """The number of operations and launches that begin in each step, on the threads of the steps."""
    threads = list({step.thread for step in steps})
    marks = [number for number, name in enumerate(names) if STEP_MARK.match(name)]  # operations before torch 1.12
    start_times = [
        rows.start[(rows.category == 0) & np.isin(rows.thread, threads) & ~np.isin(rows.name, marks)]
        for rows in (ops, launches)
    ]
    moments = np.sort(np.concatenate(start_times))
    starts, ends = (np.searchsorted(moments, [getattr(step, name) for step in steps]) for name in ("start", "end"))
    counts: list[int] = (ends - starts).tolist()
    return counts


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
