"""`events.jsonl`: the event log of a run over all of its attempts, one JSON object per line.

Every line has `event`, `time` (seconds since the epoch), `attempt` (the start of the run that wrote it, from 1), `rank`
and `step` (finished steps). The events and their further fields:

| event | by | further fields |
|---|---|---|
| `start` | rank 0, after the process group started | `world_size`, `layout`, `backend`, `process_start` (seconds) |
| `resume` | rank 0 | `path`, `seconds` |
| `fallback` | rank 0 | `refused` (the file and why), `steps_lost` |
| `ready` | rank 0, before the first step of the attempt | |
| `save_begin`, `save_end` | rank 0 | `path`; at the end `seconds`, `blocked_seconds` (training waited), `bytes` |
| `save_failed` | rank 0 | `reason`, `blocked_seconds` |
| `skip` | rank 0, when it reads the verdict | `reason` (`non_finite` or `spike`), `loss`, `grad_norm` |
| `bad_record` | the rank that read it, at most ten per rank | `place` (file and line), `reason` |
| `slow_validation` | rank 0, once per attempt | `seconds`, `between`: those since the validation before |
| `signal` | rank 0 | `name` |
| `fault` | the rank that failed; rank 0 if all failed | `error`, `lost_peer` (the cause is the loss of another rank) |
| `end` | rank 0 | `code`, `reason`; `carried`: this rank's bytes by kind of call, of Quadriga's own collectives |
"""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

from quadriga.log import logger
from quadriga.metrics.append import NOT_BLOCKING, ensure_appendable
from quadriga.metrics.jsonl import cut_torn_line, emit_notices
from quadriga.metrics.lines import BadLines, checked_lines

EVENTS_NAME = "events.jsonl"
REQUIRED = ("event", "time", "attempt", "rank", "step")

Event = dict[str, Any]


class EventLog:
    """Appends events, each in one write, so that lines of several ranks never mix. Thread-safe."""

    def __init__(self, folder: str | os.PathLike[str], rank: int, attempt: int) -> None:
        self.path = Path(folder, EVENTS_NAME)
        self.rank, self.attempt = rank, attempt
        if rank == 0:
            try:
                ensure_appendable(self.path)
                cut_torn_line(self.path)
            except OSError as error:
                _warn_once(self.path, str(error.strerror))

    def log_event(self, event: str, step: int, **facts: Any) -> None:
        """Add a line. If the file cannot be written, the line is lost, and the run continues."""
        line = {"event": event, "time": time.time(), "attempt": self.attempt, "rank": self.rank, "step": step}
        append_line(self.path, {**line, **facts})


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line of JSON in one write, so that lines of several ranks never mix. If that fails, the line is lost, and
    one warning per file is logged."""
    try:
        # Not through Appender, which truncates a partial line: other ranks may have written after it.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NOT_BLOCKING, 0o644)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode())
        finally:
            os.close(handle)
    except OSError as error:
        _warn_once(path, str(error.strerror))


@functools.cache
def _warn_once(path: Path, reason: str) -> None:
    logger.warning("%s cannot be written (%s): new content is lost, the run continues", path, reason)


def process_start_time() -> float:
    """The start time of this process in seconds since the epoch; the current time if the system does not give it."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since the boot
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        age = 0.0
    return time.time() - max(age, 0.0)


def read_events(folder: str | os.PathLike[str], notices: list[str] | None = None) -> list[Event]:
    """All events of a run, ordered by time; [] if there are none. Lines that are no events are left out and reported:
    in `notices`, or as a warning in the log.

    Raises:
        UserError: the file cannot be read, is no regular file, or is beyond a limit (`quadriga.limits`).
    """
    path = Path(folder, EVENTS_NAME)
    if not os.path.lexists(path):
        return []
    bad = BadLines(path)
    events = [line for _, line in checked_lines(path, REQUIRED, bad)]
    emit_notices(bad, notices)
    return sorted(events, key=lambda event: float(event["time"]))
