"""The profiled steps of a rank: which marks `ProfilerStep#N` count.

A step that is marked on several threads is one step: the mark on the thread that works most counts. What lies between
the last call of `profiler.step` and the end of profiling is marked as a step too; it holds next to no work, and is left
out with a warning.
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
# A last step is a stub where it launches less than this share of the work of the others (the median), and is shorter.
STUB_WORK, STUB_TIME = 0.1, 0.5


@dataclass(frozen=True)
class Step:
    """One profiled step of the run. `number`: as the run counts, or as the profiler does where the trace cannot say."""

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
    """The steps that count in their order, and warnings of what was left out. `first`: the run's number of step 0.

    Raises UserError: more steps than are read, or a trace that takes no time.
    """
    warnings: list[str] = []
    marked = [step for step in _unique_steps(ops, names, first) if step.seconds > 0]
    if len(marked) > limits.TRACE_STEPS:
        what = f"{len(marked):,} profiled steps are in it; at most {limits.TRACE_STEPS:,} are read"
        raise UserError(Problem(shortened(path, 400), what, fix="profile fewer steps"))
    if marked and _is_stub(marked, ops, launches, names):
        stub = marked.pop()
        what = f"the last mark of a step ({_time(stub.seconds)} between the last step and the end of profiling)"
        warnings.append(f"{path.name}: {what} holds no step's work: it is left out of all figures")
    if marked:
        return tuple(marked), warnings
    ends = [rows.end.max() for rows in (ops, device) if len(rows)]
    whole = float(max(ends, default=0.0))
    if whole <= 0:
        what = "all that it holds happened in one moment"
        raise UserError(Problem(shortened(path, 400), what, fix="profile again"))
    warnings.append(f"{path.name} has no marks of steps (profiler.step was not called): all of it counts as one")
    thread = int(np.bincount(ops.thread).argmax()) if len(ops) else 0
    return (Step(0, 0.0, whole, thread),), warnings


def _unique_steps(ops: EventTable, names: list[str], first: int) -> list[Step]:
    """Each step once, by start."""
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
        for step in own:  # of marks within each other the outer one
            if step.start >= end:
                found.append(step)
                end = step.end
    return sorted(found, key=lambda step: step.start)


def _is_stub(steps: list[Step], ops: EventTable, launches: EventTable, names: list[str]) -> bool:
    """Whether the last step does next to nothing, beside the others."""
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
    """By step, how many operations and launches begin within it on the threads of the steps."""
    threads = list({step.thread for step in steps})
    marks = [number for number, name in enumerate(names) if STEP_MARK.match(name)]  # operations too, before torch 1.12
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
