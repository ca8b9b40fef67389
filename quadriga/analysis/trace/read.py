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

from quadriga import limits
from quadriga.analysis.trace import fields
from quadriga.analysis.trace.document import Document
from quadriga.analysis.trace.find import rank_in_name
from quadriga.analysis.trace.metadata import Group, Notes, read_metadata
from quadriga.analysis.trace.rows import Rows
from quadriga.analysis.trace.steps import Step, steps_of
from quadriga.errors import Problem, UserError, shortened

# Categories of events, by their names since torch 1.12 and before.
HOST = {"cpu_op": 0, "user_annotation": 1, "Operator": 0}
LAUNCH = {"cuda_runtime": 0, "cuda_driver": 0, "hip_runtime": 0, "xpu_runtime": 0, "xpu_driver": 0, "Runtime": 0}
KERNEL, MEMCPY, MEMSET = 0, 1, 2
DEVICE = {"kernel": KERNEL, "gpu_memcpy": MEMCPY, "gpu_memset": MEMSET}
DEVICE |= {"Kernel": KERNEL, "Memcpy": MEMCPY, "Memset": MEMSET}
LINKS = ("External id", "external id")
# Operations of which what they were called with is kept: all that may be a collective, and look-ups of tokens.
TOLD = re.compile(r"record_param_comms$|c10d::|_?c10d_functional(_autograd)?::|gloo:|symm_mem::|nccl:|aten::embedding$")


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
    notes: Notes
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
        self.negative = 0  # rows that are said to end before they begin
        self.rows = self.told = 0
        self._tables: Mapping[str, tuple[_Table | None, int]] = (
            {name: (self.ops, sort) for name, sort in HOST.items()}
            | {name: (self.launches, sort) for name, sort in LAUNCH.items()}
            | {name: (self.device, sort) for name, sort in DEVICE.items()}
        )

    def read(self, document: Document) -> None:
        for number, event in enumerate(document, start=1):
            phase = event.get("ph")
            try:
                if phase == "X":
                    self._row(event)
                elif phase == "M" and event.get("name") == "thread_name":
                    self._label(event)
            except fields.Wrong as error:
                raise fields.Wrong(f"event {number:,}: {error}") from None

    def _label(self, event: dict[str, Any]) -> None:
        args = event.get("args")
        name = args.get("name") if isinstance(args, dict) else None
        if isinstance(name, str) and len(self.labels) < limits.TRACE_NAMES:
            self.labels[_thread(event)] = name[: limits.TRACE_NAME]

    def _row(self, event: dict[str, Any]) -> None:
        category = event.get("cat")
        table, sort = self._tables.get(category, NO_TABLE) if isinstance(category, str) else NO_TABLE
        if table is None:
            return
        start = fields.time("ts", event.get("ts"))
        length = fields.time("dur", event.get("dur") or 0.0, fields.LONGEST_DURATION)
        if length < 0:
            self.negative += 1
            return
        told = event.get("args") or {}
        if not isinstance(told, dict):
            raise fields.Wrong("args is no object")
        number = self._name(event.get("name"))
        place = self.threads.setdefault(_thread(event), len(self.threads))
        if (table is self.ops and self.may_be_a_call[number]) or "Collective name" in told:
            table.told[len(table.times) // 2] = fields.facts(told)
            self.told += 1
        self.rows += 1
        if self.rows > limits.TRACE_ROWS or self.told > limits.TRACE_CALLS or len(self.names) > limits.TRACE_NAMES:
            most = f"{limits.TRACE_ROWS:,} rows, {limits.TRACE_CALLS:,} calls and {limits.TRACE_NAMES:,} names"
            raise fields.Wrong(f"a trace of more than {most} is not read: profile fewer steps")
        link = next((told[name] for name in LINKS if name in told), None)
        ids = fields.identity("External id", link), fields.identity("correlation", told.get("correlation"))
        table.whole.extend((number, place, sort, *ids))
        table.times.extend((start, length))

    def _name(self, name: Any) -> int:
        number = self.names.get(name) if isinstance(name, str) else None
        if number is None:
            name = fields.text("name", name)
            number = self.names.setdefault(name, len(self.names))
            if number == len(self.may_be_a_call):
                self.may_be_a_call.append(TOLD.match(name) is not None)
        return number


def _thread(event: Mapping[str, Any]) -> tuple[Any, Any]:
    for key in ("pid", "tid"):
        if not isinstance(event.get(key), int | str | float | None):
            raise fields.Wrong(f"{key} is no number or text")
    return event.get("pid"), event.get("tid")


def read(path: Path, rank: int | None = None) -> RankTrace:
    """Read one file. `rank`: what to take where neither the file nor its name tells.

    Raises UserError: no trace of torch.profiler, cut off, beyond a limit, or of an unknown rank.
    """
    document, reader = Document(path), _Reader()
    try:
        reader.read(document)
    except fields.Wrong as error:
        what = f"not as torch.profiler writes it: {error}"
        raise UserError(Problem(shortened(path, 400), what, fix="leave the file out, or profile again")) from None
    tables = (reader.ops, reader.launches, reader.device)
    firsts = [min(table.times[::2]) for table in tables if table.times]
    if not firsts:
        what = "it holds no operations, kernels or copies"
        fix = "profile with ProfilerActivity.CPU, and CUDA where there is one"
        raise UserError(Problem(shortened(path, 400), what, fix=fix))
    origin, about = min(firsts), read_metadata(document.metadata, path.name)
    ops, launches, device = (table.rows(origin) for table in tables)
    names = list(reader.names)
    steps, remarks = steps_of(ops, launches, device, names, path, about.notes.first_step)
    if reader.negative:
        remarks.append(f"{reader.negative:,} rows of {path.name} end before they begin, and are left out")
    if document.strays:
        remarks.append(f"{document.strays:,} of the events of {path.name} are no objects, and are left out")
    base = about.base_ns
    return RankTrace(
        path=path,
        rank=_rank(path, about.rank, rank),
        world_size=about.world_size,
        machine=about.machine,
        backend=about.backend,
        origin_ns=None if base is None else base + round(origin * 1000),
        names=names,
        threads=[reader.labels.get(thread, "") for thread in reader.threads],
        ops=ops,
        launches=launches,
        device=device,
        steps=steps,
        groups=about.groups,
        notes=about.notes,
        warnings=[*about.warnings, *remarks],
    )


def _rank(path: Path, said: int | None, rank: int | None) -> int:
    found = next((each for each in (said, rank_in_name(path), rank) if each is not None), None)
    if found is None:
        what = "neither the file (distributedInfo) nor its name says which rank's trace this is"
        raise UserError(Problem(shortened(path, 400), what, fix="rename it to rankK_trace.json"))
    return found
