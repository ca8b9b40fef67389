"""All-gather and reduce-scatter by writing into peers' memory: slots, signals and handshakes.

For `fully_shard`, which takes them in the place of its own collectives. What moves the bytes is a `Transport`
(`comm.nvshmem`, `comm.host_slots`); everything that can be got wrong without one stands here.

A buffer of a group of n ranks has n slots alike, and slot r is rank r's: it alone fills it, on every rank. So

- an **all-gather** puts the own slot into the same slot of each peer, and waits until all other slots are full;
- a **reduce-scatter** fills the own slot with the chunk for one peer, puts it there, goes on with the next peer's, then
  keeps its own chunk; when all slots are full it adds them up by rank, in float32 or wider. n - 1 puts, no sum under
  way: the order of the sum is not that of a ring.

**Signals.** Each rank has two words a sender and a kind of call: `ready` (you may write to me) and `full` (I have
written to you). They carry the number of the call, which all ranks count alike, and are waited for by equality, as
NVSHMEM's are through torch. **Handshake**: nobody writes before the owner of the memory has said `ready`, which it says
when its own stream has come to this call, so after everything that read the buffer before. That also keeps a word from
being overwritten unread: a sender is at its next call only when it has heard our `full`, which we say after we have
read its `ready`; and it says `full` again only after our next `ready`, which follows our reading of its `full`.

**Order.** The calls of one kind run one after the other on a queue of their own, whatever stream they come from: a
stream on a GPU, a thread on a CPU.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from quadriga.comm.annotation import annotated
from quadriga.comm.heap import Heap

WORDS_A_RANK = 4  # `ready` and `full`, of two kinds of calls
AXIS = "shard"


class Completion(Protocol):
    """The end of what was submitted to a queue."""

    def wait(self) -> None:
        """Let what the caller does next come after it: the caller's stream waits on a GPU, the caller on a CPU."""

    def is_done(self) -> bool: ...


class WorkQueue(Protocol):
    """Work that is done one piece after the other."""

    def submit(self, work: Callable[[], None]) -> Completion:
        """Do `work` after what the caller has done so far and after what was submitted before."""


class Transport(Protocol):
    """Memory of `size` ranks that each may write into the others', at the same place as in its own.

    `memory`: of this rank, bytes. `put`, `signal` and `wait` are called from within the work of a queue. Words are 0 in
    the beginning.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def memory(self) -> Tensor: ...

    def new_queue(self) -> WorkQueue:
        """A new one."""

    def put(self, start: int, stop: int, peer: int, word: int, value: int) -> None:
        """Copy bytes [start, stop) of our memory to the same place at `peer`, then set `word` there. What comes later
        on this queue may change the bytes here."""

    def signal(self, peer: int, word: int, value: int) -> None:
        """Set `word` at `peer`, after all that this queue put there before."""

    def wait(self, peer: int, word: int, value: int) -> None:
        """Go on when `peer` has set our `word` to just `value`, and see what it put before."""

    def close(self) -> None:
        """Give the memory back. Call on all ranks, when nothing is on its way."""


class SlotWork(dist.Work):
    """A call that was made with `async_op=True`."""

    def __init__(self, done: Completion) -> None:
        super().__init__()
        self._done = done

    def wait(self, timeout: Any = None) -> bool:
        self._done.wait()
        return True

    def is_completed(self) -> bool:
        return self._done.is_done()


class Exchange:
    """The calls of one kind: their queue, their number, their words."""

    def __init__(self, transport: Transport, kind: int) -> None:
        self.transport, self._queue, self._calls = transport, transport.new_queue(), 0
        self._ready, self._full = (2 * kind * transport.size, (2 * kind + 1) * transport.size)

    def run(self, steps: Callable[[int], None], async_op: bool) -> dist.Work | None:
        """Take the steps of the next call, which are told its number."""
        self._calls += 1
        number = self._calls

        def work() -> None:
            with torch.no_grad():
                steps(number)

        done = self._queue.submit(work)
        if async_op:
            return SlotWork(done)
        done.wait()
        return None

    def peers(self) -> Iterator[int]:
        """All others, the next rank first, so that not everybody writes to the same one."""
        rank, size = self.transport.rank, self.transport.size
        return ((rank + distance) % size for distance in range(1, size))

    def handshake(self, number: int) -> None:
        """Say that peers may write to us, and hear the same of all of them."""
        for peer in self.peers():
            self.transport.signal(peer, self._ready + self.transport.rank, number)
        for peer in self.peers():
            self.transport.wait(peer, self._ready + peer, number)

    def put(self, start: int, size: int, peer: int, number: int) -> None:
        self.transport.put(start, start + size, peer, self._full + self.transport.rank, number)

    def wait_until_full(self, number: int) -> None:
        for peer in self.peers():
            self.transport.wait(peer, self._full + peer, number)


class SlotAllGather(AllGather):
    """Outputs are buffers of the transport's memory, handed out in turn; torch gives one back by letting go of it."""

    def __init__(self, exchange: Exchange, heap: Heap, backend: str, bytes_by_collective: Counter[str]) -> None:
        self._exchange, self._heap, self._backend, self._bytes_by_collective = (
            exchange,
            heap,
            backend,
            bytes_by_collective,
        )
        self._next_buffer = 0
        self._held: list[weakref.ref[Tensor] | None] = [None] * len(heap.gather_starts)

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for an output. Call in the same order on all ranks: it lies at the same place on each."""
        shape = [int(length) for length in size]
        wanted = math.prod(shape) * dtype.itemsize
        if wanted > self._heap.gather:
            raise ValueError(f"an all-gather of {wanted} bytes was asked for; buffers of {self._heap.gather} were made")
        index, self._next_buffer = self._next_buffer, (self._next_buffer + 1) % len(self._held)
        holder = self._held[index]
        if holder is not None and holder() is not None:
            raise RuntimeError(f"more than {len(self._held)} outputs of all-gathers are in use at once")
        start = self._heap.gather_starts[index]
        output = self._exchange.transport.memory[start : start + wanted].view(dtype).view(shape)
        self._held[index] = weakref.ref(output)
        return output

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gather `input_tensor` of all ranks into `output_tensor`, which `allocate` gave."""
        exchange, transport = self._exchange, self._exchange.transport
        _check(output_tensor, input_tensor, group, transport)
        base = output_tensor.data_ptr() - transport.memory.data_ptr()
        if base not in self._heap.gather_starts:
            raise ValueError("the output of an all-gather must be one that `allocate` gave")
        size = input_tensor.numel() * input_tensor.itemsize
        start = base + transport.rank * size

        def steps(number: int) -> None:
            own = output_tensor.view(transport.size, -1)[transport.rank]
            if own.data_ptr() != input_tensor.data_ptr():
                own.copy_(input_tensor.view(-1))
            exchange.handshake(number)
            for peer in exchange.peers():
                exchange.put(start, size, peer, number)
            exchange.wait_until_full(number)

        self._bytes_by_collective["all_gather"] += transport.size * size
        with annotated(AXIS, "all_gather", output_tensor, transport.size, self._backend):
            return exchange.run(steps, async_op)


class SlotReduceScatter(ReduceScatter):
    """Chunks meet in a scratch of the transport's memory; inputs and outputs are ordinary tensors."""

    def __init__(self, exchange: Exchange, heap: Heap, backend: str, bytes_by_collective: Counter[str]) -> None:
        self._exchange, self._heap, self._backend, self._bytes_by_collective = (
            exchange,
            heap,
            backend,
            bytes_by_collective,
        )

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty([int(length) for length in size], dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Sum `input_tensor` over the ranks; `output_tensor` is this rank's chunk of the sum."""
        exchange, transport = self._exchange, self._exchange.transport
        _check(input_tensor, output_tensor, group, transport)
        if op != dist.ReduceOp.SUM:
            raise ValueError(f"gradients are summed, and nothing else: {op} was asked for")
        if not input_tensor.dtype.is_floating_point:
            raise ValueError(f"{input_tensor.dtype} is not summed")
        whole = input_tensor.numel() * input_tensor.itemsize
        if whole > self._heap.scatter:
            raise ValueError(f"a sum of {whole} bytes was asked for; a scratch of {self._heap.scatter} was made")
        start, size = self._heap.scatter_start, whole // transport.size
        slots = transport.memory[start : start + whole].view(input_tensor.dtype).view(transport.size, -1)

        def steps(number: int) -> None:
            chunks, own = input_tensor.view(transport.size, -1), slots[transport.rank]
            exchange.handshake(number)
            for peer in exchange.peers():
                own.copy_(chunks[peer])
                exchange.put(start + transport.rank * size, size, peer, number)
            own.copy_(chunks[transport.rank])
            exchange.wait_until_full(number)
            output_tensor.view(-1).copy_(torch.sum(slots, dim=0, dtype=_wide(slots.dtype)))

        self._bytes_by_collective["reduce_scatter"] += whole
        with annotated(AXIS, "reduce_scatter", input_tensor, transport.size, self._backend):
            return exchange.run(steps, async_op)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of `dtype` are added up; the sum is rounded once."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def _check(whole: Tensor, part: Tensor, group: dist.ProcessGroup, transport: Transport) -> None:
    if group.size() != transport.size or group.rank() != transport.rank:
        raise ValueError(f"this transport serves {transport.size} ranks, and the group has {group.size()}")
    if whole.dtype != part.dtype:
        raise ValueError(f"the whole is {whole.dtype} and a rank's part of it {part.dtype}")
    if whole.numel() != transport.size * part.numel():
        raise ValueError(f"{transport.size} parts of {part.numel()} numbers do not make {whole.numel()}")
    if not (whole.is_contiguous() and part.is_contiguous()):
        raise ValueError("tensors must be contiguous")


class SlotCollectives:
    """The two collectives of `fully_shard` over one transport. `bytes_by_collective`: bytes so far, by kind of call."""

    def __init__(self, transport: Transport, heap: Heap, backend: str) -> None:
        self._transport = transport
        self.bytes_by_collective: Counter[str] = Counter()
        self.all_gather = SlotAllGather(Exchange(transport, 0), heap, backend, self.bytes_by_collective)
        self.reduce_scatter = SlotReduceScatter(Exchange(transport, 1), heap, backend, self.bytes_by_collective)

    def install(self, module: FSDPModule) -> None:
        """Let the parameters and gradients of `module` go this way."""
        module.set_custom_all_gather(self.all_gather)
        module.set_custom_reduce_scatter(self.reduce_scatter)

    def close(self) -> None:
        """Give the memory back. Call on all ranks, when no call is on its way."""
        self._transport.close()
