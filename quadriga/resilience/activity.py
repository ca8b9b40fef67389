"""Detects whether this rank makes progress before its first step ends, from another thread of the process.

The duration of a download, a compilation or a load of weights is not known in advance. So a fixed time limit does not
work, and any of these counts as progress:

- The run entered another phase, step or micro-batch (`Progress`).
- The main thread has a call chain that was not sampled before in this phase.
- This process and its children read or wrote at least the bytes of `RATE` and `FLOOR` between two samples.
- Its children (compilers) used at least that much CPU time.
- It touched at least that many new pages of memory. Arithmetic on a CPU does so with every large result.

Limits: an endless loop shows none of these signs, although it uses the CPU. A monitor that runs in the background does
not count either: the thresholds hold for each interval between two samples, so small amounts do not add up. A rank that
only waits for others makes no progress. Without /proc the figures from there are missing, and the others decide.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType

from quadriga.resilience.progress import Progress

# The threshold is RATE per second between two samples, and at least FLOOR. Bytes: below the slowest download, above the
# 24 KB that a system monitor writes every few seconds, at the usual interval of 5 s. Children: a twentieth of a core.
RATE = {"bytes": 8192.0, "child_seconds": 0.05, "page_faults": 0.0}
FLOOR = {"bytes": 4096.0, "child_seconds": 0.02, "page_faults": 256.0}
MONITOR = "wandb"  # prefix of the names of processes that report continuously and do no work for the run
COMPILER = ("torch._dynamo", "torch._inductor", "triton")
COMMUNICATION = ("torch.distributed", "torch._C._distributed_c10d")
INNERMOST = 4  # frames; a wait for other ranks is one of them


class ActivityMonitor:
    """Samples the main thread of this process. Only one other thread may call it; that thread's work does not count."""

    def __init__(self, progress: Progress, pause: float) -> None:
        """`pause`: seconds between two samples."""
        self._progress = progress
        self._thresholds = {name: max(FLOOR[name], rate * pause) for name, rate in RATE.items()}
        self._position: tuple[object, ...] = ()
        self._call_chains: set[int] = set()
        self._last_usage: dict[str, float] = {}
        self._since = time.monotonic()
        self._modules: list[str] = []

    def reset(self) -> None:
        """Restart the clock: this process itself was suspended, so the time without progress does not count."""
        self._since = time.monotonic()

    def poll(self, waits: bool = False) -> float:
        """Seconds since the last progress. While this rank `waits` for others, no sign counts as progress."""
        moves = any(list(self._progress_signs()))  # a list, so that every sign is updated, not only those up to a True
        if moves and not waits:
            self._since = time.monotonic()
        return time.monotonic() - self._since

    @property
    def compiles(self) -> bool:
        """Whether the main thread was in the compiler at the last sample."""
        return any(module.startswith(COMPILER) for module in self._modules)

    @property
    def communicates(self) -> bool:
        """Whether the main thread was in a call of torch.distributed at the last sample: it waits for other ranks."""
        return any(module.startswith(COMMUNICATION) for module in self._modules[:INNERMOST])

    def _progress_signs(self) -> Iterator[bool]:
        position = (self._progress.phase, self._progress.step, self._progress.ticks)
        if position[:2] != self._position[:2]:
            self._call_chains.clear()
        yield position != self._position
        self._position = position
        frames = list(main_frames())
        self._modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
        chain = hash(tuple(id(frame.f_code) for frame in frames))
        yield chain not in self._call_chains
        self._call_chains.add(chain)
        for name, amount in _usage():
            yield amount - self._last_usage.get(name, amount) >= self._thresholds[name]
            self._last_usage[name] = amount  # decreases if a child has ended, because its usage is no longer in the sum


def main_frames() -> Iterator[FrameType]:
    """The frames of the main thread, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _usage() -> Iterator[tuple[str, float]]:
    """The usage of this process so far, without that of the calling thread: (name, amount)."""
    own = os.getpid()
    with suppress(OSError):
        here = _bytes(f"/proc/{own}/io") - _bytes(f"/proc/{own}/task/{threading.get_native_id()}/io")
        children = list(_descendants(own))
        yield "bytes", here + sum(_bytes(f"/proc/{child}/io") for child in children)
        yield "child_seconds", _ended_children() + sum(map(_cpu_seconds, children))
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    if hasattr(resource, "RUSAGE_THREAD"):
        faults -= resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    yield "page_faults", faults


def _bytes(file: str) -> float:
    """Bytes read and written through system calls, also on sockets that are read like files; 0 if the file is gone."""
    with suppress(OSError):
        fields = dict(line.split(": ") for line in Path(file).read_text().splitlines())
        return float(fields["rchar"]) + float(fields["wchar"])
    return 0.0


def _descendants(pid: int) -> Iterator[int]:
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split():
                if _process_name(child).startswith(MONITOR):
                    continue
                yield int(child)
                yield from _descendants(int(child))


def _process_name(pid: str) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text()
    return ""


def _cpu_seconds(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _ended_children() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime
