"""Threads that run iterators ahead of their reader."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any

JOIN_SECONDS = 5.0  # a thread that hangs in a read from the network is left behind: it is a daemon


class _Feed:
    """One thread, one generator, at most `depth` items ahead. Knows nothing of its reader, which may be collected."""

    def __init__(self, items: Generator[Any, None, None], depth: int, name: str) -> None:
        self.items = items
        self.ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.free = threading.Semaphore(depth)
        self.stopped = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            while True:
                self.free.acquire()
                if self.stopped:
                    break
                self.ready.put((next(self.items), None))
        except BaseException as error:  # noqa: BLE001 (whatever it is, the reader must hear of it)
            self.ready.put((None, error))
        finally:
            self.items.close()

    def stop(self) -> None:
        self.stopped = True
        self.free.release()


class Prefetcher:
    """Runs generators ahead, a thread for each, and returns one item of each at a time, in order."""

    def __init__(self, generators: Sequence[Generator[Any, None, None]], depth: int) -> None:
        self._feeds = [_Feed(items, depth, f"data-{index}") for index, items in enumerate(generators)]

    def next(self) -> list[Any]:
        """One item of each generator; raises what a generator raised, StopIteration at its end included."""
        items = []
        for feed in self._feeds:
            item, error = feed.ready.get()
            if error is not None:
                feed.ready.put((None, error))  # so it is for every later call
                raise error
            feed.free.release()
            items.append(item)
        return items

    def close(self) -> None:
        """End the threads. Items that were made ahead are dropped."""
        for feed in self._feeds:
            feed.stop()
        for feed in self._feeds:
            feed.thread.join(JOIN_SECONDS)
