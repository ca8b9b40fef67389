"""Which file each reading thread waits for, so that a slow one can be named while training waits."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from quadriga.log import logger

T = TypeVar("T")
STALL_SECONDS = 5.0  # of waiting for a batch before the file is named

READING: dict[int, tuple[Callable[[], str], float]] = {}  # by thread: what it reads, and since when


@contextmanager
def being_read(location: Callable[[], str]) -> Iterator[None]:
    """Notes that this thread reads from `location`, which is formatted only if it is shown."""
    thread = threading.get_ident()
    READING[thread] = location, time.monotonic()
    try:
        yield
    finally:
        READING.pop(thread, None)


def wait_for(ready: queue.SimpleQueue[T], thread: threading.Thread, named: set[str]) -> T:
    """The next item of a queue that `thread` fills. The caller has waited for STALL_SECONDS.

    Logs each file that the thread reads meanwhile, unless it is in `named`, adds it, and logs when reading goes on."""
    started, warned = time.monotonic() - STALL_SECONDS, ""
    while True:
        location, since = READING.get(thread.ident or 0, (None, 0.0))
        name = "" if location is None else location()
        if warned and name != warned:
            _goes_on(warned, started)
            warned = ""
        if name and name not in named:
            named.add(warned := name)
            logger.warning("data: training waits for %s, which is read for %.0f s", name, time.monotonic() - since)
        try:
            item = ready.get(timeout=STALL_SECONDS)
        except queue.Empty:
            continue
        if warned:
            _goes_on(warned, started)
        return item


def _goes_on(name: str, started: float) -> None:
    logger.warning("data: %s goes on; training waited for %.0f s", name, time.monotonic() - started)
