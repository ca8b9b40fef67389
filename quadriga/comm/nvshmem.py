"""NVSHMEM through torch's symmetric memory: the transport of `comm.slots` between GPUs. All else goes over NCCL.

This module has not run on a GPU yet. It relies on these facts from the sources of torch 2.11 to 2.13:

- `nvshmem_put_with_signal(bytes, word, value, pe)` copies bytes of symmetric memory to the *same* offset of another
  process (torch has no put to another offset). Then it sets a 64-bit word there. Both follow the order of the stream,
  and later work on the stream may overwrite the source.
- `nvshmem_wait_for_signal(word, value, pe)` blocks the stream until the word is *equal* to the value.
- The process number is the rank in the default group, for calls of any group. So no NVSHMEM team is needed. Creating
  one is a collective of all processes with equal arguments, which several shard groups (HSDP, TP, PP) do not have.
- The first allocation initializes NVSHMEM. Every allocation is a collective of all processes of the run, of equal size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from quadriga.comm.collectives import barrier
from quadriga.comm.slots import WORDS_A_RANK
from quadriga.errors import Fault
from quadriga.units import format_bytes

HIGH_PRIORITY = -1  # as for the streams of `fully_shard`


class StreamCompletion:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def is_done(self) -> bool:
        return self._event.query()


class StreamQueue:
    """A CUDA stream. `submit` enqueues work after the current work of the caller's stream, and returns at once."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=HIGH_PRIORITY)

    def submit(self, work: Callable[[], None]) -> StreamCompletion:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        return StreamCompletion(self._stream.record_event())


class NvshmemTransport:
    """`size` bytes per rank of `group`. Create it on all ranks of the run together, with the same size. Its waits have
    no time limit."""

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device, timeout_seconds: float) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._device = device
        self._processes = dist.get_process_group_ranks(group)
        words = WORDS_A_RANK * self.size + 1  # the last one is a dummy, put by a signal without bytes
        try:
            symmetric_memory.set_backend("NVSHMEM")
            self.memory: Tensor = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
            self._words: Tensor = symmetric_memory.empty(words, dtype=torch.int64, device=device).zero_()
        except RuntimeError as error:
            needed = f"{format_bytes(size)} of symmetric memory that the run needs"
            what = f"NVSHMEM did not start, or could not allocate the {needed}"
            raise Fault(f"{what}: {error}\nNothing was trained. Set NVSHMEM_DEBUG=INFO for details.") from error
        torch.cuda.synchronize(device)
        barrier()  # no rank may signal before the words of all ranks are 0

    def new_queue(self) -> StreamQueue:
        return StreamQueue(self._device)

    def put(self, start: int, stop: int, peer: int, word: int, value: int) -> None:
        self._put(self.memory[start:stop], peer, word, value)

    def signal(self, peer: int, word: int, value: int) -> None:
        self._put(self._words[-1:], peer, word, value)

    def wait(self, peer: int, word: int, value: int) -> None:
        torch.ops.symm_mem.nvshmem_wait_for_signal(self._words[word : word + 1], value, self._processes[peer])

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        barrier()  # freeing symmetric memory is a collective too
        self.memory = self._words = torch.empty(0, dtype=torch.uint8, device=self._device)

    def _put(self, what: Tensor, peer: int, word: int, value: int) -> None:
        process = self._processes[peer]
        torch.ops.symm_mem.nvshmem_put_with_signal(what, self._words[word : word + 1], value, process)


def is_offered() -> bool:
    """Whether this torch was built with NVSHMEM, and its library is installed."""
    return bool(symmetric_memory.is_nvshmem_available())
