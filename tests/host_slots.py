"""A transport over shared memory of one machine, for tests of the protocol of `comm.slots` without a GPU.

It has the same contract as NVSHMEM: work on a queue runs asynchronously, in the queue's order; a signal is visible only
after the bytes that were put before it; a wait ends only at exactly the value that it waits for.
"""

from __future__ import annotations

import mmap
import os
import queue
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from quadriga.comm.collectives import barrier
from quadriga.comm.slots import WORDS_A_RANK
from quadriga.json_collectives import all_gather_json

FOLDER = "/dev/shm"
WORD = 8  # bytes
PAUSES = (0.0, 2e-5, 1e-4, 1e-3)  # seconds between two reads of a signal word, longer in a longer wait
LOOKS = 50  # reads with each pause


class HostCompletion:
    def __init__(self) -> None:
        self.future: Future[None] = Future()

    def wait(self) -> None:
        self.future.result()

    def is_done(self) -> bool:
        return self.future.done()


class HostQueue:
    """A thread that runs work in order. A failure is raised in the wait for that work and in all later waits, because
    after a failure no result of the queue is valid."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Callable[[], None], HostCompletion] | None] = queue.SimpleQueue()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="slots", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], None]) -> HostCompletion:
        done = HostCompletion()
        self._waiting.put((work, done))
        return done

    def end(self) -> None:
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            done = item[1]
            self._failure = self._failure or _failure_of(item[0])
            del item  # frees the call's tensors before its end is reported, as callers expect
            if self._failure is not None:
                done.future.set_exception(self._failure)
            else:
                done.future.set_result(None)


def _failure_of(work: Callable[[], None]) -> Exception | None:
    try:
        work()
    except Exception as error:  # noqa: BLE001 - raised again in `HostCompletion.wait`
        return error
    return None


class HostTransport:
    """`size` bytes per rank of `group`, whose ranks are processes of one machine. Create it on all of them together.

    Raises:
        OSError: the machine has too little shared memory.
        RuntimeError: the ranks are on several machines.
    """

    def __init__(self, group: dist.ProcessGroup, size: int, _: torch.device, timeout_seconds: float) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._timeout = timeout_seconds
        self._queues: list[HostQueue] = []
        self._fence = threading.Lock()
        self._closed = False
        words = WORDS_A_RANK * self.size
        head = -(-words * WORD // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor, path = tempfile.mkstemp(prefix="quadriga-slots-", dir=FOLDER)
        try:
            os.posix_fallocate(descriptor, 0, head + size)  # else a later write could end in SIGBUS
            os.close(descriptor)
            places = all_gather_json([socket.gethostname(), path], group)
            if len({host for host, _ in places}) > 1:
                raise RuntimeError("host-slots works within one machine, but the ranks are on several")
            maps = [_mapped(place) for _, place in places]
            barrier(group)  # all ranks have mapped all files, so the names can be removed
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)
        self._words = [np.frombuffer(each, np.int64, words) for each in maps]
        self._memories = [torch.frombuffer(each, dtype=torch.uint8, offset=head) for each in maps]

    @property
    def memory(self) -> Tensor:
        return self._memories[self.rank]

    def new_queue(self) -> HostQueue:
        self._queues.append(HostQueue())
        return self._queues[-1]

    def put(self, start: int, stop: int, peer: int, word: int, value: int) -> None:
        self._memories[peer][start:stop].copy_(self.memory[start:stop])
        self.signal(peer, word, value)

    def signal(self, peer: int, word: int, value: int) -> None:
        # A CPU may reorder stores, but not across the atomic operations of a lock that is released and acquired again.
        with self._fence:
            pass
        with self._fence:
            self._words[peer][word] = value

    def wait(self, peer: int, word: int, value: int) -> None:
        words, looks, deadline = self._words[self.rank], 0, time.monotonic() + self._timeout
        while words[word] != value:
            if self._closed:
                raise RuntimeError("the shared memory was released while a call waited for a peer")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"rank {peer} of {self.size} did not signal within {self._timeout:g} s: word {word} is "
                    f"{words[word]} and should become {value} (the rank has ended, hangs, or made other calls)"
                )
            time.sleep(PAUSES[min(looks // LOOKS, len(PAUSES) - 1)])
            looks += 1
        with self._fence:
            pass
        with self._fence:  # the bytes are read after the word
            pass

    def close(self) -> None:
        self._closed = True
        for each in self._queues:
            each.end()
        self._queues.clear()
        self._words.clear()
        self._memories = [torch.empty(0, dtype=torch.uint8)] * self.size


def _mapped(path: str) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0)
