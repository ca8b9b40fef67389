"""Threads that read ahead of training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Sequence
from typing import Any

from quadriga.data import stalls

JOIN_SECONDS = 5.0  # a thread that hangs in a network read is abandoned: it is a daemon


class _Feed:
    """One thread, one generator, at most `depth` items ahead. Has no reference to its reader, so it can be freed."""

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
        except BaseException as error:  # noqa: BLE001 (every error is passed to the reader)
            self.ready.put((None, error))
        finally:
            self.items.close()

    def stop(self) -> None:
        self.stopped = True
        self.free.release()


class Prefetcher:
    """Runs each generator in a thread, at most `depth` items ahead, and returns one item of each per call, in order."""

    def __init__(self, generators: Sequence[Generator[Any, None, None]], depth: int) -> None:
        self._feeds = [_Feed(items, depth, f"data-{index}") for index, items in enumerate(generators)]
        self._named: set[str] = set()  # the files that were logged

    def next(self) -> list[Any]:
        """One item of each generator. Raises what a generator raised, also StopIteration at its end.

        While it waits for longer than `stalls.STALL_SECONDS`, it logs each file that is read meanwhile, once."""
        items = []
        for feed in self._feeds:
            try:
                item, error = feed.ready.get(timeout=stalls.STALL_SECONDS)
            except queue.Empty:
                item, error = stalls.wait_for(feed.ready, feed.thread, self._named)
            if error is not None:
                feed.ready.put((None, error))  # later calls raise the same error
                raise error
            feed.free.release()
            items.append(item)
        return items

    def close(self) -> None:
        """Ends the threads and drops the prefetched items."""
        for feed in self._feeds:
            feed.stop()
        for feed in self._feeds:
            feed.thread.join(JOIN_SECONDS)
