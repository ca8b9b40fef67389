"""Whether this rank gets on before its first step has ended, as far as another thread of it can see.

Nobody knows in advance how long a download, a compilation or the reading of weights takes. So what counts is progress,
and it is any of these:

- the run came to another phase, step or micro-batch (`Progress`);
- the main thread was seen in a chain of functions in which it was not seen before in this phase;
- this process or its children read or wrote as much as `RATE` and `FLOOR` say between two looks;
- its children (compilers) worked for as long;
- it touched as many pages of new memory (arithmetic on a CPU does so with every large result).

A loop without an end does none of them, although it works all the time. Nor does what reports on the run in the
background: the least is asked of every pause between two looks, so that a trickle does not add up. A rank that only
waits for others makes none. Where the system has no /proc, the figures that come from there are missing and the others
decide.
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

# Per second of the pause, and at least. Bytes: less than the slowest download, more than 24 KB every few seconds of a
# system monitor at the usual pause of 5 s. Children: a twentieth of a core.
RATE = {"bytes": 8192.0, "child_seconds": 0.05, "page_faults": 0.0}
FLOOR = {"bytes": 4096.0, "child_seconds": 0.02, "page_faults": 256.0}
MONITOR = "wandb"  # how the names of processes begin that report all the time, and do nothing for the run
COMPILER = ("torch._dynamo", "torch._inductor", "triton")
COMMUNICATION = ("torch.distributed", "torch._C._distributed_c10d")
INNERMOST = 4  # functions, in which a wait for other ranks shows


class ActivityMonitor:
    """Looks at the main thread of this process. To be asked by one other thread alone, whose own work is left out."""

    def __init__(self, progress: Progress, pause: float) -> None:
        """`pause`: seconds between two looks."""
        self._progress = progress
        self._thresholds = {name: max(FLOOR[name], rate * pause) for name, rate in RATE.items()}
        self._position: tuple[object, ...] = ()
        self._call_chains: set[int] = set()
        self._last_usage: dict[str, float] = {}
        self._since = time.monotonic()
        self._modules: list[str] = []

    def reset(self) -> None:
        """Forget for how long nothing has moved: it was this process that did not run."""
        self._since = time.monotonic()

    def poll(self, waits: bool = False) -> float:
        """Seconds since progress was last seen; there is none while this rank `waits` for others."""
        moves = any(list(self._progress_signs()))  # every measure is brought up to date, not only the first that moved
        if moves and not waits:
            self._since = time.monotonic()
        return time.monotonic() - self._since

    @property
    def compiles(self) -> bool:
        """Whether the main thread was within the compiler at the last look."""
        return any(module.startswith(COMPILER) for module in self._modules)

    @property
    def communicates(self) -> bool:
        """Whether the main thread was within a call of torch.distributed at the last look: it waits for other ranks."""
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
            self._last_usage[name] = amount  # less than before where a child is gone, and with it what it had done


def main_frames() -> Iterator[FrameType]:
    """The frames of the main thread, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _usage() -> Iterator[tuple[str, float]]:
    """What this process has done so far, but for the thread that asks."""
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
    """Read and written through system calls, sockets that are read like files included; 0 for what is gone."""
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
