"""Goodput: how a run spent its time, from its first start to its last log line, over all of its starts.

The only sources are `events.jsonl` and `metrics.jsonl`, so it works for a run in progress and for a killed one. Every
second is counted once. `seconds` and `shares` have these keys:

- `trained`: steps that count, including the compilation in the first one;
- `data_wait`: time of those steps in which the first rank waited for data;
- `validated`, `saved`: time in which training waited for it, in steps that count;
- `started`: from the start of the first rank's process to its first step, including the load of checkpoints;
- `lost`: everything that a start did after the step from which a later start resumed;
- `down`: from the last line of a start to the beginning of the next start's first process, if the earlier start had
  not finished.

The pause after a start that finished the run, which a later one extended, is not counted. It is `idle_seconds`, and not
part of the shares.

A killed start ends with its last line, so up to `metrics.log_freq` of its steps count as `down`, not as `lost`. If a
later start resumed from a step between two lines, the time between them is divided by steps. Steps after the newest
save count as trained until a later start resumes from that save. `effective` is the share `trained`, also known as the
effective training time ratio, or goodput.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from quadriga.errors import Problem, UserError
from quadriga.metrics.events import Event, read_events
from quadriga.metrics.jsonl import Record, emit_notices, iter_records
from quadriga.metrics.lines import BadLines
from quadriga.metrics.loggers import JSONL_NAME
from quadriga.units import format_some

# The fields that a record of each kind must have besides attempt and step.
REQUIRED = {
    "train": ("time", "elapsed_seconds", "data_wait"),
    "validation": ("time", "seconds"),
    "backends": ("time",),
}
CLOCK = "lines of another run, or a clock that was set; its times are not reliable"
SAME_TIME = 60.0  # seconds by which the clocks of ranks may differ
AFTER_THE_END = 3600.0  # seconds that the last save of a rank and its records may take after the event `end`
KINDS = ("trained", "data_wait", "validated", "saved", "started", "lost", "down")

Mark = tuple[float, int]  # a time, and the number of steps finished by then


@dataclass(frozen=True)
class Attempt:
    """One start of the run. Times in seconds since the epoch; steps are numbers of finished steps."""

    attempt: int
    began: float
    ready: float | None  # None: it never began its first step
    last: float  # time of its last log line
    first_step: int  # from which it resumed
    last_step: int  # the last one in its logs
    kept_step: int  # up to here its steps count; later ones were trained again
    faults: tuple[str, ...]
    ended: str


@dataclass(frozen=True)
class Goodput:
    """`skipped_steps`: bad steps that were skipped, among those that count. `idle_seconds`: between a start that
    finished the run and the next one. `notices`: the parts of the logs that were not usable."""

    attempts: tuple[Attempt, ...]
    seconds: dict[str, float]
    skipped_steps: int
    saves: int
    idle_seconds: float = 0.0
    notices: tuple[str, ...] = ()

    @property
    def wall_seconds(self) -> float:
        """From the first start to the last log line, without the pauses in which the run was finished."""
        return self.attempts[-1].last - self.attempts[0].began - self.idle_seconds

    @property
    def shares(self) -> dict[str, float]:
        whole = sum(self.seconds.values())
        return {kind: seconds / whole if whole else 0.0 for kind, seconds in self.seconds.items()}

    @property
    def replayed_steps(self) -> int:
        return sum(attempt.last_step - attempt.kept_step for attempt in self.attempts)

    def as_json(self) -> dict[str, Any]:
        """The output of `quadriga goodput --json`. All times in seconds; `from` and `to` since the epoch."""
        return {
            "from": self.attempts[0].began,
            "to": self.attempts[-1].last,
            "wall_seconds": self.wall_seconds,
            "idle_seconds": self.idle_seconds,
            "effective": self.shares["trained"],
            "shares": self.shares,
            "seconds": self.seconds,
            "step": self.attempts[-1].last_step,
            "replayed_steps": self.replayed_steps,
            "skipped_steps": self.skipped_steps,
            "saves": self.saves,
            "faults": sum(bool(attempt.faults) for attempt in self.attempts),
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "notices": list(self.notices),
        }


def read_goodput(folder: str | os.PathLike[str]) -> Goodput | None:
    """The goodput of the run in `folder`; None if its logs have no line.

    Raises:
        UserError: a log cannot be read, is no regular file, is beyond a limit, or no line of it is a record.
    """
    metrics, notices = Path(folder, JSONL_NAME), list[str]()
    bad = BadLines(metrics)
    records = list(iter_records(metrics, REQUIRED, bad)) if os.path.lexists(metrics) else []
    records = [record for record in records if "time" in record]  # only the time of an unknown kind counts
    emit_notices(bad, notices)
    found = compute_goodput(read_events(folder, notices), records)
    if found is None and notices:
        raise UserError(Problem("RUN", "\n".join(["its logs have no valid line:", *notices]), str(folder)))
    return None if found is None else replace(found, notices=(*notices, *found.notices))


def compute_goodput(events: Sequence[Event], records: Sequence[Record]) -> Goodput | None:
    """The goodput of a run from the events and records of all attempts; None if there are none."""
    starts = [start for number, lines in _by_attempt(events, records) for start in _starts_of(number, *lines)]
    if not starts:
        return None
    notices = [notice for start in starts for notice in start.notices]
    numbers = Counter(start.number for start in starts)
    several = [str(number) for number, count in numbers.items() if count > 1]
    if several:
        notices.append(f"several starts have the number {format_some(several)}: these are files of several runs")
        starts.sort(key=lambda start: start.began)
    for before, start in pairwise(starts):
        if start.began < before.began:
            notices.append(f"start {start.number} began before start {before.number}: {CLOCK}")
            start.began = before.began
    seconds = dict.fromkeys(KINDS, 0.0)
    attempts: list[Attempt] = []
    skipped = saves = 0
    idle = 0.0
    limit, next_began = math.inf, math.inf
    for start in reversed(starts):
        start.end_before(next_began)
        for kind, amount in start.spent(limit).items():
            seconds[kind] += amount
        pause = next_began - start.last if attempts else 0.0
        if start.finished:
            idle += pause
        else:
            seconds["down"] += pause
        attempts.append(start.to_attempt(limit, is_newest=not attempts))
        skipped += start.count("skip", limit)
        saves += start.count("save_end", limit)
        limit = min(limit, start.first_step if start.ready is not None else math.inf)
        next_began = start.began
    return Goodput(tuple(reversed(attempts)), seconds, skipped, saves, idle, tuple(notices))


def _by_attempt(
    events: Sequence[Event], records: Sequence[Record]
) -> list[tuple[int, tuple[list[Event], list[Record]]]]:
    """Events and records by the number of their start, in its order."""
    found: dict[int, tuple[list[Event], list[Record]]] = defaultdict(lambda: ([], []))
    for event in events:
        found[event["attempt"]][0].append(event)
    for record in records:
        found[record["attempt"]][1].append(record)
    return sorted(found.items())


def _starts_of(number: int, events: list[Event], records: list[Record]) -> Iterator[_Start]:
    """The starts with this number: one, or one for each event `start` of the first rank if files were joined."""
    times = [float(event["time"]) for event in events if event["event"] == "start" and event["rank"] == 0]
    for first, following in zip([-math.inf, *times[1:]], [*times[1:], math.inf], strict=True):
        own = [line for line in events if first <= line["time"] < following]
        logged = [line for line in records if first <= line["time"] < following]
        if own or logged:
            yield _Start(number, own, logged)


class _Start:
    """The lines of one attempt."""

    def __init__(self, number: int, events: list[Event], records: list[Record]) -> None:
        self.number, self.events = number, events
        self.notices: list[str] = []
        self.training = _ascending([record for record in records if record["kind"] == "train"])
        self.validations = [record for record in records if record["kind"] == "validation"]
        start, ready = self._first("start"), self._first("ready")
        self.ready: float | None = None
        self.first_step = 0
        if ready is not None:
            self.ready, self.first_step = float(ready["time"]), int(ready["step"])
        elif self.training:  # without an event log: the clock of a record begins right before the first step
            self.ready = float(self.training[0]["time"] - self.training[0]["elapsed_seconds"])
            self.first_step = self.training[0]["step"] - 1
        lines = (*events, *records)
        times = [float(line["time"]) for line in lines]
        self.last = max(times)
        self.began = min([*times, math.inf if self.ready is None else self.ready])
        if start is not None:
            self.began = float(min(start.get("process_start", start["time"]), start["time"]))
            end = self._first("end")
            late = end is not None and self.last > end["time"] + AFTER_THE_END
            if late or min(times) < self.began - SAME_TIME:
                where = "after its end" if late else "before its beginning"
                self.notices.append(f"start {number} has lines from {where}: {CLOCK}")
        timed = (*events, *self.training, *self.validations)
        marks = [(float(line["time"]), int(line["step"])) for line in timed if line.get("rank", 0) == 0]
        self.marks = list(_rising(marks, self.ready, self.first_step))

    @property
    def finished(self) -> bool:
        """Whether it finished the last step of the run, as configured then."""
        end = self._first("end")
        return end is not None and end.get("code") == 0

    def end_before(self, time: float) -> None:
        """Clamp all times to this start; the next one began at `time`. Times beyond come from another clock."""
        self.last = min(max(self.last, self.began), time)
        self.ready = min(max(self.ready, self.began), self.last) if self.ready is not None else None
        self.marks = [(min(max(at, self.began), self.last), step) for at, step in self.marks]

    @property
    def last_step(self) -> int:
        return self.marks[-1][1] if self.marks else self.first_step

    def kept_step(self, limit: float) -> int:
        return int(max(min(self.last_step, limit), self.first_step))

    def count(self, event: str, limit: float) -> int:
        return sum(one["event"] == event and one["step"] <= limit for one in self.events)

    def spent(self, limit: float) -> dict[str, float]:
        """Seconds by kind. A later start trained the steps beyond `limit` again."""
        if self.ready is None:
            return {"started": self.last - self.began}
        given_up = self._passed(limit)
        useful = given_up - self.ready
        waits = {
            "data_wait": self._data_wait(limit),
            "validated": sum(record["seconds"] for record in self.validations if record["step"] <= limit),
            "saved": sum(self._saves(limit)),
        }
        together = sum(waits.values())
        if together > useful:  # by rounding, or because a rank's clock was set
            waits = {kind: amount * useful / together for kind, amount in waits.items()}
            together = useful
        kept = {"started": self.ready - self.began, "trained": useful - together, "lost": self.last - given_up}
        return kept | waits

    def to_attempt(self, limit: float, is_newest: bool) -> Attempt:
        faults = sorted((e for e in self.events if e["event"] == "fault"), key=lambda e: bool(e.get("lost_peer")))
        end = self._first("end")
        if end is not None:
            ended = str(end.get("reason", "finished"))
        elif faults:
            ended = f"rank {faults[0]['rank']}: {faults[0].get('error', 'failed')}"
        else:
            ended = "no event since: it is running, or was killed" if is_newest else "killed without an event"
        return Attempt(
            attempt=self.number,
            began=self.began,
            ready=self.ready,
            last=self.last,
            first_step=self.first_step,
            last_step=max(self.last_step, self.first_step),
            kept_step=self.kept_step(limit),
            faults=tuple(str(fault.get("error", "")) for fault in faults),
            ended=ended,
        )

    def _first(self, event: str) -> Event | None:
        return next((one for one in self.events if one["event"] == event), None)

    def _passed(self, limit: float) -> float:
        """The end time of the last step up to `limit`, including the time after it and before the next step."""
        assert self.ready is not None
        before, after = (self.ready, self.first_step), None
        for mark in self.marks:
            if mark[1] > limit:
                after = mark
                break
            before = mark
        if after is None:
            return self.last
        if limit <= before[1]:
            return before[0]
        return before[0] + (after[0] - before[0]) * (limit - before[1]) / (after[1] - before[1])

    def _data_wait(self, limit: float) -> float:
        total, step = 0.0, self.first_step
        for record in self.training:
            steps = max(record["step"] - step, 1)
            total += record["data_wait"] * max(min(limit - step, steps), 0) / steps
            step = record["step"]
        return total

    def _saves(self, limit: float) -> Iterator[float]:
        """The seconds that training waited for each save."""
        ends: dict[int, Event] = {}  # by step, the first end after the current position
        waits: list[float] = []
        for event in reversed(self.events):
            if event["event"] in ("save_end", "save_failed"):
                ends[event["step"]] = event
            elif event["event"] == "save_begin" and event["step"] <= limit:
                waits.append(self._waited(event, ends.get(event["step"])))
        yield from reversed(waits)

    def _waited(self, begin: Event, end: Event | None) -> float:
        until = float(end["time"]) if end is not None else self.last
        # Marks ascend in time and in step, so the last one before the end decides.
        place = bisect_left(self.marks, until, key=lambda mark: mark[0]) - 1
        if place >= 0 and self.marks[place][0] > begin["time"] and self.marks[place][1] > begin["step"]:
            # Training continued during the save, so it was asynchronous.
            return float(end.get("blocked_seconds", 0.0)) if end is not None else 0.0
        return max(until - float(begin["time"]), 0.0)


def _ascending(records: list[Record]) -> list[Record]:
    """The records without those that repeat or go back to a step, in which other lines are of another run."""
    kept: list[Record] = []
    for record in records:
        if not kept or record["step"] > kept[-1]["step"]:
            kept.append(record)
    return kept


def _rising(marks: list[Mark], ready: float | None, first_step: int) -> Iterator[Mark]:
    """The marks from `ready` on, by time; those of an older step are left out."""
    if ready is None:
        return
    newest = first_step
    for time, step in sorted(marks):
        if time >= ready and step >= newest:
            newest = step
            yield time, step
