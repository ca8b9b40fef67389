"""For how long this rank has waited for others, as far as that can be seen from another thread of it."""

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
    """For how long a value has been the same, by the clock of this process."""

    def __init__(self) -> None:
        self._value: Any = None
        self._since = time.monotonic()

    def seconds(self, value: Any) -> float:
        now = time.monotonic()
        if value != self._value:
            self._value, self._since = value, now
        return now - self._since


class Wait(NamedTuple):
    """A wait of `seconds` so far, in `operation`, of `limit` seconds that are allowed; `host`: in a host group."""

    seconds: float
    operation: str
    limit: float
    host: bool = False

    @property
    def is_too_long(self) -> bool:
        return self.seconds > self.limit


def worst_wait(waits: Iterable[Wait], default: Wait) -> Wait:
    """The one to report. Host groups have messages under way that nobody waits for, so training comes first."""
    return max(waits, key=lambda wait: (wait.is_too_long, not wait.host, wait.seconds), default=default)


class WaitTracker:
    """Follows the operations of this rank. `launched` is the number of them, as of the last look."""

    def __init__(self, limit: float, host_limit: float, short: float) -> None:
        """Seconds: what a wait in training may take, what one in a host group may, and what is not worth a look."""
        self._limit, self._host_limit, self._short = limit, host_limit, short
        self._groups: dict[str, StableTimer] = {}
        self._operations: dict[tuple[str, int], flight_recorder.GroupOperation | None] = {}
        self._message = StableTimer()
        self.launched = 0

    def poll(self) -> tuple[Wait | None, Wait | None]:
        """The longest wait in training, and in host groups: those may be of another thread."""
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
        if key not in self._operations:  # slow to ask for, so once a wait
            self._operations = {old: name for old, name in self._operations.items() if old[0] != group}
            self._operations[key] = flight_recorder.oldest_pending(group)
        found = self._operations[key]
        if found is None:  # not one of training, which would have waited for it instead of recording others
            return Wait(seconds, "an operation that is no longer recorded", self._host_limit, host=True)
        name = f"{found.kind} of group {found.group} ({found.purpose}), its operation {ended + 1}"
        host = found.purpose == HOST
        return Wait(seconds, name, self._host_limit if host else self._limit, host)

    def _pipeline_message_seconds(self) -> float:
        """For how long the main thread has stood in a wait of the pipeline without doing anything at all."""
        main = threading.main_thread().ident or 0
        frame = sys._current_frames().get(main)
        if frame is None or not frame.f_globals.get("__name__", "").startswith(PIPELINE):
            self._message = StableTimer()
            return 0.0
        if not hasattr(time, "pthread_getcpuclockid"):
            return 0.0
        worked = time.clock_gettime(time.pthread_getcpuclockid(main))
        return self._message.seconds((frame.f_lasti, worked))
