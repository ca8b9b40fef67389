"""Whether this rank gets on before its first step has ended, as far as another thread of it can see.

Nobody knows in advance how long a download, a compilation or the reading of weights takes. So what counts is progress,
and it is any of these:

- the run came to another phase, step or micro-batch (`Progress`);
- the main thread was seen in a chain of functions in which it was not seen before in this phase;
- this process or its children read or wrote `LEAST["bytes"]`;
- its children (compilers) worked for `LEAST["child_seconds"]`;
- it touched new memory, `LEAST["page_faults"]` pages (arithmetic on a CPU does so with every large result).

A loop without an end does none of them, although it works all the time. Where the system has no /proc, the figures
that come from there are missing and the others decide.
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

from quadriga.train.progress import Progress

LEAST = {"bytes": 4096.0, "child_seconds": 0.2, "page_faults": 256.0}
COMPILER = ("torch._dynamo", "torch._inductor", "triton")
COMMUNICATION = ("torch.distributed", "torch._C._distributed_c10d")
INNERMOST = 4  # functions, in which a wait for other ranks shows


class Activity:
    """Looks at the main thread of this process. To be asked by one other thread alone, whose own work is left out."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._place: tuple[object, ...] = ()
        self._chains: set[int] = set()
        self._counted: dict[str, float] = {}
        self._since = time.monotonic()
        self._modules: list[str] = []

    def began_anew(self) -> None:
        """Forget for how long nothing has moved: it was this process that did not run."""
        self._since = time.monotonic()

    def look(self) -> float:
        """Seconds since progress was last seen."""
        if any(list(self._moves())):  # every measure is brought up to date, not only the first that moved
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

    def _moves(self) -> Iterator[bool]:
        place = (self._progress.phase, self._progress.step, self._progress.beats)
        if place[:2] != self._place[:2]:
            self._chains.clear()
        yield place != self._place
        self._place = place
        frames = list(main_frames())
        self._modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
        chain = hash(tuple(id(frame.f_code) for frame in frames))
        yield chain not in self._chains
        self._chains.add(chain)
        for name, amount in _amounts():
            least = self._counted.setdefault(name, amount) + LEAST[name]
            # Less than before: a child is gone, and with it what it had done.
            if amount >= least or amount < self._counted[name]:
                self._counted[name] = amount
                yield amount >= least


def main_frames() -> Iterator[FrameType]:
    """The frames of the main thread, the innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _amounts() -> Iterator[tuple[str, float]]:
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
                yield int(child)
                yield from _descendants(int(child))


def _cpu_seconds(pid: int) -> float:
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _ended_children() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime
