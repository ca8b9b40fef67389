"""One rank's trace as columns of numbers: what the host did, what it launched, and what ran on the device."""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import Problem, UserError
from quadriga.trace.document import Document
from quadriga.trace.find import rank_in_name
from quadriga.trace.intervals import Spans, spans

HOST = {"cpu_op": 0, "user_annotation": 1}
LAUNCH = {"cuda_runtime": 0, "cuda_driver": 0, "hip_runtime": 0, "xpu_runtime": 0}
KERNEL, MEMCPY, MEMSET = 0, 1, 2
DEVICE = {"kernel": KERNEL, "gpu_memcpy": MEMCPY, "gpu_memset": MEMSET}
STEP = re.compile(r"ProfilerStep#(\d+)$")
# Operations of which what they were called with is kept: all that may be a collective.
TOLD = re.compile(r"record_param_comms$|c10d::|_?c10d_functional(_autograd)?::|gloo:|symm_mem::|nccl:")
OWN_NOTES, RANKS_CUT_OFF = "quadriga", "..."


@dataclass(frozen=True)
class Rows:
    """Columns of equal length, in the order of the file. Times in seconds from the trace's origin.

    `name` and `thread` are indices into the trace's names and threads; `sort` is a number of HOST or DEVICE; `link` is
    torch's External id (an operation and what it launched share it), `correlation` that of a launch and its rows on the
    device; both are 0 where there is none. `told` holds what some rows were called with, by row.
    """

    name: NDArray[np.int64]
    start: NDArray[np.float64]
    end: NDArray[np.float64]
    thread: NDArray[np.int64]
    sort: NDArray[np.int64]
    link: NDArray[np.int64]
    correlation: NDArray[np.int64]
    told: Mapping[int, Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.start)

    def spans(self, chosen: NDArray[Any] | None = None) -> Spans:
        return spans(self.start, self.end) if chosen is None else spans(self.start[chosen], self.end[chosen])


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


@dataclass(frozen=True)
class Group:
    """A process group. `purpose`: torch's description of it; `ranks`: () where the trace does not say."""

    name: str
    purpose: str
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class RankTrace:
    """`origin_ns`: the moment 0 in ns since 1970, None where the trace does not tell it. `notes`: of Quadriga's own."""

    path: Path
    rank: int
    world_size: int | None
    machine: str | None
    backend: str | None
    origin_ns: int | None
    names: list[str]
    threads: list[str]
    ops: Rows
    launches: Rows
    device: Rows
    steps: tuple[Step, ...]
    groups: Mapping[str, Group]
    notes: Mapping[str, Any]
    warnings: list[str] = field(default_factory=list)

    @property
    def on_device(self) -> bool:
        return len(self.device) > 0

    def named(self, pattern: re.Pattern[str]) -> NDArray[np.int64]:
        """Numbers of the names that match from their beginning."""
        return np.array([number for number, name in enumerate(self.names) if pattern.match(name)], dtype=np.int64)


class _Table:
    def __init__(self) -> None:
        self.whole = array("q")  # name, thread, sort, link, correlation, one after the other
        self.times = array("d")  # start, duration
        self.told: dict[int, Mapping[str, Any]] = {}

    def rows(self, origin: float) -> Rows:
        whole = np.frombuffer(self.whole, dtype=np.int64).reshape(-1, 5) if self.whole else np.empty((0, 5), np.int64)
        times = np.frombuffer(self.times).reshape(-1, 2) if self.times else np.empty((0, 2))
        name, thread, sort, link, correlation = (np.ascontiguousarray(column) for column in whole.T)
        start = (times[:, 0] - origin) * 1e-6
        return Rows(name, start, start + times[:, 1] * 1e-6, thread, sort, link, correlation, self.told)


NO_TABLE: tuple[_Table | None, int] = (None, 0)


class _Reader:
    """Sorts events into tables; names and threads get numbers as they come."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.may_be_a_call: list[bool] = []  # by name
        self.threads: dict[tuple[Any, Any], int] = {}
        self.labels: dict[tuple[Any, Any], str] = {}
        self.ops, self.launches, self.device = _Table(), _Table(), _Table()
        self._tables: Mapping[str, tuple[_Table | None, int]] = (
            {name: (self.ops, sort) for name, sort in HOST.items()}
            | {name: (self.launches, sort) for name, sort in LAUNCH.items()}
            | {name: (self.device, sort) for name, sort in DEVICE.items()}
        )

    def read(self, document: Document) -> None:
        for event in document:
            phase = event.get("ph")
            if phase == "X":
                self._row(event)
            elif phase == "M" and event.get("name") == "thread_name":
                self.labels[event.get("pid"), event.get("tid")] = str(event.get("args", {}).get("name", ""))

    def _row(self, event: dict[str, Any]) -> None:
        table, sort = self._tables.get(event.get("cat", ""), NO_TABLE)
        if table is None:
            return
        name, told = event["name"], event.get("args") or {}
        number = self.names.get(name)
        if number is None:
            number = self.names[name] = len(self.names)
            self.may_be_a_call.append(TOLD.match(name) is not None)
        thread = event.get("pid"), event.get("tid")
        place = self.threads.setdefault(thread, len(self.threads))
        if (table is self.ops and self.may_be_a_call[number]) or "Collective name" in told:
            table.told[len(table.times) // 2] = told
        link, correlation = told.get("External id") or 0, told.get("correlation") or 0
        table.whole.extend((number, place, sort, int(link), int(correlation)))
        table.times.extend((float(event["ts"]), float(event.get("dur") or 0.0)))


def read(path: Path, rank: int | None = None) -> RankTrace:
    """Read one file. `rank`: what to take where neither the file nor its name tells.

    Raises UserError: no trace of torch.profiler, cut off, or of an unknown rank.
    """
    document, reader = Document(path), _Reader()
    try:
        reader.read(document)
    except (KeyError, TypeError, ValueError) as error:
        what = f"an event of it is not as torch.profiler writes it ({type(error).__name__}: {error})"
        raise UserError(Problem(str(path), what, fix="leave the file out, or profile again")) from None
    tables = (reader.ops, reader.launches, reader.device)
    firsts = [min(table.times[::2]) for table in tables if table.times]
    if not firsts:
        what = "it holds no operations, kernels or copies"
        raise UserError(Problem(str(path), what, fix="profile with ProfilerActivity.CPU, and CUDA where there is one"))
    origin, about = min(firsts), document.metadata
    group = about.get("distributedInfo") or {}
    ops, launches, device = (table.rows(origin) for table in tables)
    names, notes, warnings = list(reader.names), about.get(OWN_NOTES) or {}, []
    steps = _steps(ops, names, notes.get("first_step", 0))
    if not steps:
        warnings.append(f"{path.name} has no marks of steps (profiler.step was not called): all of it counts as one")
        steps = _as_one(ops, device)
    base = about.get("baseTimeNanoseconds")
    return RankTrace(
        path=path,
        rank=_rank(path, group, rank),
        world_size=group.get("world_size"),
        machine=about.get("host_name") or notes.get("machine"),
        backend=group.get("backend"),
        origin_ns=None if base is None else int(base) + round(origin * 1000),
        names=names,
        threads=[reader.labels.get(thread, "") for thread in reader.threads],
        ops=ops,
        launches=launches,
        device=device,
        steps=steps,
        groups={group.name: group for group in map(_group, group.get("pg_config") or ())},
        notes=notes,
        warnings=warnings,
    )


def _rank(path: Path, group: Mapping[str, Any], rank: int | None) -> int:
    said = group.get("rank")
    found = next((each for each in (said, rank_in_name(path), rank) if each is not None), None)
    if found is None:
        what = "neither the file (distributedInfo) nor its name says which rank's trace this is"
        raise UserError(Problem(str(path), what, fix="rename it to rankK_trace.json"))
    return int(found)


def _steps(ops: Rows, names: list[str], first: int) -> tuple[Step, ...]:
    matches = {number: match for number, name in enumerate(names) if (match := STEP.match(name))}
    places = np.flatnonzero(np.isin(ops.name, list(matches)))
    found = [
        Step(first + int(matches[ops.name[at]].group(1)), float(ops.start[at]), float(ops.end[at]), int(ops.thread[at]))
        for at in places
    ]
    return tuple(sorted(found, key=lambda step: step.start))


def _as_one(ops: Rows, device: Rows) -> tuple[Step, ...]:
    ends = [rows.end.max() for rows in (ops, device) if len(rows)]
    thread = int(np.bincount(ops.thread).argmax()) if len(ops) else 0
    return (Step(0, 0.0, float(max(ends)), thread),)


def _group(said: Mapping[str, Any]) -> Group:
    ranks = said.get("ranks") or ()
    return Group(str(said.get("pg_name", "")), str(said.get("pg_desc", "")), tuple(ranks))
