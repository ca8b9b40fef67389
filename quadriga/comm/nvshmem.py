"""NVSHMEM through torch's symmetric memory: the transport of `comm.slots` between GPUs. All else goes over NCCL.

Untested here: no GPU was there to run it. What it relies on, all of it read in the sources of torch 2.11 to 2.13:

- `nvshmem_put_with_signal(bytes, word, value, pe)` copies bytes of symmetric memory to the *same* place at another
  process (a put from one place to another is not offered), then sets a 64-bit word there, in the order of the stream;
  the source may be changed by what follows on the stream;
- `nvshmem_wait_for_signal(word, value, pe)` holds the stream until the word is *equal* to the value;
- processes are numbered by their rank in the default group, whatever group a call is for. So no team of NVSHMEM is
  needed: splitting one off is a collective of all processes with equal arguments, which several shard groups beside
  each other (HSDP, TP, PP) do not have;
- the first allocation starts NVSHMEM, and every one is a collective of all processes of the run, of equal size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor

from quadriga.comm import nccl
from quadriga.comm.collectives import barrier
from quadriga.comm.slots import WORDS_A_RANK
from quadriga.errors import Fault
from quadriga.units import format_bytes

PROCESS_GROUP, device = nccl.PROCESS_GROUP, nccl.device
HIGH_PRIORITY = -1  # as the streams of `fully_shard` have it


class StreamCompletion:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._event)

    def is_done(self) -> bool:
        return self._event.query()


class StreamQueue:
    """A stream: what is submitted is enqueued at once, behind the caller's stream, and done later."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=HIGH_PRIORITY)

    def submit(self, work: Callable[[], None]) -> StreamCompletion:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        return StreamCompletion(self._stream.record_event())


class NvshmemTransport:
    """`size` bytes a rank of `group`. Make it on all ranks of the run together, with the same size."""

    def __init__(self, group: dist.ProcessGroup, size: int, device: torch.device) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._device = device
        self._processes = dist.get_process_group_ranks(group)
        words = WORDS_A_RANK * self.size + 1  # the last one is of no meaning: a signal without bytes puts it
        try:
            symmetric_memory.set_backend("NVSHMEM")
            self.memory: Tensor = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
            self._words: Tensor = symmetric_memory.empty(words, dtype=torch.int64, device=device).zero_()
        except RuntimeError as error:
            needed = f"{format_bytes(size)} of symmetric memory that the run needs"
            what = f"NVSHMEM did not start, or did not give the {needed}"
            raise Fault(f"{what}: {error}\nNothing was trained. NVSHMEM_DEBUG=INFO tells more.") from error
        torch.cuda.synchronize(device)
        barrier()  # nobody may signal before the words of all are 0

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
        barrier()  # giving memory back is a collective too
        self.memory = self._words = torch.empty(0, dtype=torch.uint8, device=self._device)

    def _put(self, what: Tensor, peer: int, word: int, value: int) -> None:
        process = self._processes[peer]
        torch.ops.symm_mem.nvshmem_put_with_signal(what, self._words[word : word + 1], value, process)


def is_offered() -> bool:
    """Whether this torch was built with NVSHMEM, and the library is there."""
    return bool(symmetric_memory.is_nvshmem_available())
