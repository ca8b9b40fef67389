"""Reads one rank's trace into tables: operations of the host, launches, and rows of the device; and its steps.

The profiled steps follow from the marks `ProfilerStep#N`. If several threads mark a step, the mark on the thread with
the most operations counts. The time between the last call of `profiler.step` and the end of profiling is marked too. It
has almost no work, and is excluded with a warning.
"""

from __future__ import annotations

import re
import statistics
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga import limits
from quadriga.analysis.trace import fields
from quadriga.analysis.trace.document import TraceDocument, trace_error
from quadriga.analysis.trace.find import rank_in_name
from quadriga.analysis.trace.intervals import Spans, make_spans
from quadriga.analysis.trace.metadata import Metadata, read_metadata
from quadriga.units import plural


@dataclass(frozen=True)
class EventTable:
    """Columns of equal length, in the order of the file. Times in seconds from the trace's origin.

    `name` and `thread` are indices into the trace's names and threads; `category` is a number of `HOST_CATEGORIES` or
    `DEVICE_CATEGORIES`; `link` is torch's External id (an operation and the rows that it launched share it),
    `correlation` is the id of a launch and its device rows; both are 0 if there is none. `args`: arguments of some
    rows, by row.
    """

    name: NDArray[np.int64]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    thread: NDArray[np.int64]
    category: NDArray[np.int64]
    link: NDArray[np.int64]
    correlation: NDArray[np.int64]
    args: Mapping[int, Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.start)

    def spans(self, chosen: NDArray[Any]) -> Spans:
        return make_spans(self.start[chosen], self.end[chosen])

    def nested_order(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The rows by thread and start, longer ones first, so that a row follows those which contain it."""
        return places[np.lexsort((-self.end[places], self.start[places], self.thread[places]))]


# --- steps -----------------------------------------------------------------------------------------------------------


STEP_MARK = re.compile(r"ProfilerStep#([0-9]{1,15})$")
# The last step is a stub if its work and its time are below these shares of the medians of the other steps.
STUB_WORK, STUB_TIME = 0.1, 0.5
STEP_OVERLAP = 0.1  # share of the shorter of two steps by which they may overlap


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
    marked, inside = _without_overlaps([step for step in _unique_steps(ops, names, first) if step.seconds > 0])
    what = f"{plural(inside, 'mark')} of steps in {path.name} within other steps: ignored"
    warnings = [what] if inside else []
    if len(marked) > limits.TRACE_STEPS:
        what = f"{len(marked):,} profiled steps are in it; at most {limits.TRACE_STEPS:,} are read"
        raise trace_error(path, what, "profile fewer steps")
    if marked and _is_stub(marked, ops, launches, names):
        stub = marked.pop()
        what = f"the last mark of a step ({_time(stub.seconds)} between the last step and the end of profiling)"
        warnings.append(f"{path.name}: {what} has no work of a step: it is excluded from all figures")
    if marked:
        return tuple(marked), warnings
    whole = float(max((rows.end.max() for rows in (ops, device) if len(rows)), default=0.0))
    if whole <= 0:
        raise trace_error(path, "all its events are at the same time", "profile again")
    warnings.append(f"{path.name} has no marks of steps (profiler.step was not called): the whole counts as one step")
    thread = int(np.bincount(ops.thread).argmax()) if len(ops) else 0
    return (Step(0, 0.0, whole, thread),), warnings


def step_marks(ops: EventTable, names: list[str], first: int = 0) -> Iterator[Step]:
    """The marks of steps, in the order of the file."""
    numbers = {place: int(match[1]) for place, name in enumerate(names) if (match := STEP_MARK.match(name))}
    for at in np.flatnonzero(np.isin(ops.name, list(numbers))):
        number = first + numbers[int(ops.name[at])]
        yield Step(number, float(ops.start[at]), float(ops.end[at]), int(ops.thread[at]))


def _unique_steps(ops: EventTable, names: list[str], first: int) -> list[Step]:
    """Each step once, in the order of starts."""
    work = np.bincount(ops.thread)
    by_number: dict[int, list[Step]] = defaultdict(list)
    for step in step_marks(ops, names, first):
        by_number[step.number].append(step)
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


def _without_overlaps(steps: list[Step]) -> tuple[list[Step], int]:
    """The steps that begin after the end of the step before, and the number of the others. Of steps that begin at the
    same time, the longest one counts. Steps may overlap by a share of their length, since times are rounded."""
    kept: list[Step] = []
    for step in sorted(steps, key=lambda step: (step.start, -step.end)):
        if not kept or step.start >= kept[-1].end - STEP_OVERLAP * min(step.seconds, kept[-1].seconds):
            kept.append(step)
    return kept, len(steps) - len(kept)


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
    return [int(count) for count in ends - starts]


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


# --- the file --------------------------------------------------------------------------------------------------------


# Categories of events, by their names since torch 1.12 and in older versions.
HOST_CATEGORIES = {"cpu_op": 0, "user_annotation": 1, "Operator": 0}
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver", "hip_runtime", "xpu_runtime", "xpu_driver", "Runtime")
KERNEL, MEMCPY, MEMSET = 0, 1, 2
DEVICE_CATEGORIES = {"kernel": KERNEL, "gpu_memcpy": MEMCPY, "gpu_memset": MEMSET}
DEVICE_CATEGORIES |= {"Kernel": KERNEL, "Memcpy": MEMCPY, "Memset": MEMSET}
LINKS = ("External id", "external id")
# Operations whose arguments are kept: those that may be collectives, and embedding look-ups.
KEEPS_ARGS = re.compile(
    r"record_param_comms$|c10d::|_?c10d_functional(_autograd)?::|gloo:|symm_mem::|nccl:|aten::embedding$"
)


@dataclass(frozen=True)
class RankTrace:
    """`origin_ns`: time 0 in ns since 1970; None if unknown."""

    rank: int
    origin_ns: int | None
    metadata: Metadata
    names: list[str]
    ops: EventTable
    launches: EventTable
    device: EventTable
    steps: tuple[Step, ...]
    warnings: list[str]

    @property
    def on_device(self) -> bool:
        return len(self.device) > 0

    @property
    def step_spans(self) -> Spans:
        return make_spans([step.start for step in self.steps], [step.end for step in self.steps])

    def is_named(self, rows: EventTable, pattern: re.Pattern[str]) -> NDArray[np.bool_]:
        """Whether the pattern is found in the name of each row."""
        return np.isin(rows.name, [number for number, name in enumerate(self.names) if pattern.search(name)])


class _EventTableBuilder:
    def __init__(self) -> None:
        self.whole = array("q")  # name, thread, category, link, correlation of each row
        self.times = array("d")  # start, duration in microseconds
        self.args: dict[int, Mapping[str, Any]] = {}

    def rows(self, origin: float) -> EventTable:
        whole = np.frombuffer(self.whole, dtype=np.int64).reshape(-1, 5) if self.whole else np.empty((0, 5), np.int64)
        times = np.frombuffer(self.times).reshape(-1, 2) if self.times else np.empty((0, 2))
        name, thread, category, link, correlation = (np.ascontiguousarray(column) for column in whole.T)
        start = (times[:, 0] - origin) * 1e-6
        return EventTable(name, start, start + times[:, 1] * 1e-6, thread, category, link, correlation, self.args)


NOT_KEPT: tuple[_EventTableBuilder | None, int] = (None, 0)


class _EventReader:
    """Sorts events into tables. Names and threads are numbered in the order of their first event."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.may_be_a_call: list[bool] = []  # by name
        self.threads: dict[tuple[Any, Any], int] = {}
        self.ops, self.launches, self.device = _EventTableBuilder(), _EventTableBuilder(), _EventTableBuilder()
        self.negative = 0  # rows that end before they begin
        self.row_count = self.call_count = 0
        self._tables: Mapping[str, tuple[_EventTableBuilder | None, int]] = (
            {name: (self.ops, category) for name, category in HOST_CATEGORIES.items()}
            | dict.fromkeys(LAUNCH_CATEGORIES, (self.launches, 0))
            | {name: (self.device, category) for name, category in DEVICE_CATEGORIES.items()}
        )

    def read(self, document: TraceDocument) -> None:
        for number, event in enumerate(document, start=1):
            try:
                if event.get("ph") == "X":
                    self._row(event)
            except fields.FieldError as error:
                raise fields.FieldError(f"event {number:,}: {error}") from None

    def _row(self, event: dict[str, Any]) -> None:
        cat = event.get("cat")
        table, category = self._tables.get(cat, NOT_KEPT) if isinstance(cat, str) else NOT_KEPT
        if table is None:
            return
        start = fields.microseconds("ts", event.get("ts"))
        length = fields.microseconds("dur", 0.0 if (dur := event.get("dur")) is None else dur, fields.LONGEST_DURATION)
        if length < 0:
            self.negative += 1
            return
        args = {} if (args := event.get("args")) is None else args
        if not isinstance(args, dict):
            raise fields.FieldError("args is not an object")
        number = self._name(event.get("name"))
        place = self.threads.setdefault(_thread(event), len(self.threads))
        if (table is self.ops and self.may_be_a_call[number]) or "Collective name" in args:
            table.args[len(table.times) // 2] = fields.call_args(args)
            self.call_count += 1
        self.row_count += 1
        if (
            self.row_count > limits.TRACE_ROWS
            or self.call_count > limits.TRACE_CALLS
            or len(self.names) > limits.TRACE_NAMES
        ):
            most = f"{limits.TRACE_ROWS:,} rows, {limits.TRACE_CALLS:,} calls and {limits.TRACE_NAMES:,} names"
            raise fields.FieldError(f"a trace with more than {most} is not read: profile fewer steps")
        link = next((args[name] for name in LINKS if name in args), None)
        ids = fields.signed_id("External id", link), fields.signed_id("correlation", args.get("correlation"))
        table.whole.extend((number, place, category, *ids))
        table.times.extend((start, length))

    def _name(self, name: Any) -> int:
        number = self.names.get(name) if isinstance(name, str) else None
        if number is None:
            name = fields.text("name", name)
            number = self.names.setdefault(name, len(self.names))
            if number == len(self.may_be_a_call):
                self.may_be_a_call.append(KEEPS_ARGS.match(name) is not None)
        return number


def _thread(event: Mapping[str, Any]) -> tuple[Any, Any]:
    for key in ("pid", "tid"):
        if not isinstance(event.get(key), int | str | float | None):
            raise fields.FieldError(f"{key} is not a number or text")
    return event.get("pid"), event.get("tid")


def read_trace(path: Path, rank: int | None = None) -> RankTrace:
    """Read one file. `rank`: used if neither the file nor its name has the rank.

    Raises UserError if it is not a trace of torch.profiler, is truncated, exceeds a limit, or has no known rank.
    """
    document, reader = TraceDocument(path), _EventReader()
    try:
        reader.read(document)
    except fields.FieldError as error:
        what = f"not as torch.profiler writes it: {error}"
        raise trace_error(path, what, "leave the file out, or profile again") from None
    tables = (reader.ops, reader.launches, reader.device)
    firsts = [min(table.times[::2]) for table in tables if table.times]
    if not firsts:
        fix = "profile with ProfilerActivity.CPU, and CUDA where there is one"
        raise trace_error(path, "the trace has no operations, kernels or copies", fix)
    origin, metadata = min(firsts), read_metadata(document.metadata, path.name)
    ops, launches, device = (table.rows(origin) for table in tables)
    names = list(reader.names)
    steps, remarks = steps_of(ops, launches, device, names, path, metadata.notes.first_step)
    if reader.negative:
        remarks.append(f"{reader.negative:,} rows of {path.name} end before they begin, and are ignored")
    if document.non_objects:
        remarks.append(f"{document.non_objects:,} of the events of {path.name} are not objects, and are ignored")
    if document.has_more:
        remarks.append(f"text after the end of the trace in {path.name} is ignored: is the file a copy of two?")
    base, warnings = metadata.base_ns, [*metadata.warnings, *remarks]
    origin_ns = None if base is None else base + round(origin * 1000)
    found = next((each for each in (metadata.rank, rank_in_name(path), rank) if each is not None), None)
    if found is None:
        what = "neither the file (distributedInfo) nor its name has the rank"
        raise trace_error(path, what, "rename it to rankK_trace.json")
    return RankTrace(found, origin_ns, metadata, names, ops, launches, device, steps, warnings)
