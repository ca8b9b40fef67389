"""Measures how long this rank has waited for other ranks, from another thread of the process."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from quadriga.comm import flight_recorder
from quadriga.comm.collectives import HOST

PIPELINE = "torch.distributed.pipelining"  # over gloo, its messages are not in the flight recorder


class StableTimer:
    """Measures for how many seconds a value has been the same, by the clock of this process."""

    def __init__(self) -> None:
        self._value: Any = None
        self._since = time.monotonic()

    def seconds(self, value: Any) -> float:
        now = time.monotonic()
        if value != self._value:
            self._value, self._since = value, now
        return now - self._since


class Wait(NamedTuple):
    """A wait of `seconds` so far, in `operation`, with `limit` seconds allowed; `host`: in a host group."""

    seconds: float
    operation: str
    limit: float
    host: bool = False

    @property
    def is_too_long(self) -> bool:
        return self.seconds > self.limit


def worst_wait(waits: Iterable[Wait], default: Wait) -> Wait:
    """The wait to report. Host groups may have pending operations that no thread waits for, so training comes first."""
    return max(waits, key=lambda wait: (wait.is_too_long, not wait.host, wait.seconds), default=default)


class WaitTracker:
    """Tracks the operations of this rank. `launched` is their number at the last poll."""

    def __init__(self, limit: float, host_limit: float, short: float) -> None:
        """All in seconds. `limit`: for a wait in training; `host_limit`: in a host group; `short`: shorter waits are
        ignored."""
        self._limit, self._host_limit, self._short = limit, host_limit, short
        self._groups: dict[str, StableTimer] = {}
        self._operations: dict[tuple[str, int], flight_recorder.GroupOperation | None] = {}
        self._message = StableTimer()
        self.launched = 0

    def poll(self) -> tuple[Wait | None, Wait | None]:
        """The longest wait in training, and the longest in host groups, which may be that of another thread."""
        traffic = flight_recorder.traffic()
        self.launched = sum(group.launched for group in traffic.values())
        stuck = {name: group for name, group in traffic.items() if group.ended < group.launched}
        self._groups = {name: self._groups.get(name, StableTimer()) for name in stuck}
        seconds = {name: timer.seconds(stuck[name].ended) for name, timer in self._groups.items()}
        long = [self._wait(name, stuck[name].ended, past) for name, past in seconds.items() if past > self._short]
        message = self._pipeline_message_seconds()
        if message > self._short:
            long.append(Wait(message, "a message of the pipeline", self._limit))
        training, host = ([wait for wait in long if wait.host == host] for host in (False, True))
        return max(training, default=None), max(host, default=None)

    def _wait(self, group: str, ended: int, seconds: float) -> Wait:
        key = group, ended
        if key not in self._operations:  # the query is slow, so it is made once per wait
            self._operations = {old: name for old, name in self._operations.items() if old[0] != group}
            self._operations[key] = flight_recorder.oldest_pending(group)
        found = self._operations[key]
        if found is None:  # not of training: that would have waited for it, and launched no others
            return Wait(seconds, "an operation that is no longer recorded", self._host_limit, host=True)
        name = f"{found.kind} of group {found.group} ({found.purpose}), its operation {ended + 1}"
        host = found.purpose == HOST
        return Wait(seconds, name, self._host_limit if host else self._limit, host)

    def _pipeline_message_seconds(self) -> float:
        """Seconds that the main thread has been in a wait of the pipeline without using CPU time."""
        main = threading.main_thread().ident or 0
        frame = sys._current_frames().get(main)
        if frame is None or not frame.f_globals.get("__name__", "").startswith(PIPELINE):
            self._message = StableTimer()
            return 0.0
        if not hasattr(time, "pthread_getcpuclockid"):
            return 0.0
        worked = time.clock_gettime(time.pthread_getcpuclockid(main))
        return self._message.seconds((frame.f_lasti, worked))
