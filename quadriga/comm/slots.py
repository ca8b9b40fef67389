"""All-gather and reduce-scatter by puts into the memory of peers: slots, signals and a handshake.

`fully_shard` uses them instead of its own collectives. A `Transport` (`comm.nvshmem`) moves the bytes; this module has
the protocol, which needs no GPU to test.

A buffer of a group of n ranks has n slots of equal size. Only rank r writes slot r, on every rank. Each rank has two
signal words per peer and kind of call: `ready` and `full`. Their value is the number of the call, which is equal on all
ranks. A wait ends when the word is *equal* to that number, as NVSHMEM's does through torch. Call number n:

1. All-gather only: rank r copies its input into its slot.
2. Handshake: rank r sets `ready[r] = n` on each peer: the peer may now write here. Then it waits for `ready == n` of
   all peers. This follows, on the queue, all work that read the buffer before.
3. Rank r puts its slot into the same slot of each peer, and sets `full[r] = n` there. In a reduce-scatter it first
   copies the chunk of that peer into its slot, and its own chunk after the last peer's.
4. It waits for `full == n` of all peers. A reduce-scatter then adds the slots in the order of ranks, in float32 or
   wider. This order is not that of a ring.

Invariant: no signal is overwritten before it is read. A peer starts call n + 1 only after it has read this rank's
`full == n`, which this rank sets after it has read the peer's `ready == n`. The peer sets `full = n + 1` only after
this rank's `ready = n + 1`, which follows the read of `full == n`.

Calls of one kind run in order on their own queue, from whatever stream they come: a stream on a GPU, a thread on a CPU.
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
from torch.profiler import record_function

from quadriga.comm.heap import Heap

WORDS_A_RANK = 4  # `ready` and `full`, for two kinds of calls
KINDS = ("all_gather", "reduce_scatter")
# The name of a call in a profiler trace, because torch does not record it by itself (docs/communication.md).
ANNOTATION = "quadriga:collective axis=shard kind={kind} bytes={size} dtype={dtype} ranks={ranks} backend={backend}"


class Completion(Protocol):
    """The end of work that was submitted to a queue."""

    def wait(self) -> None:
        """Order the caller's next work after it: on a GPU the caller's stream waits, on a CPU the caller."""

    def is_done(self) -> bool: ...


class WorkQueue(Protocol):
    """Runs work in the order of submission."""

    def submit(self, work: Callable[[], None]) -> Completion:
        """Run `work` after the caller's work so far and after all work that was submitted before."""


class Transport(Protocol):
    """Memory of `size` ranks; each rank may write into that of the others, at the same offset as in its own.

    `memory`: this rank's memory, uint8, one dimension. `put`, `signal` and `wait` are called within the work of a
    queue. Signal words are 0 at the beginning. Constructors take the process group, the bytes per rank, the device, and
    the time limit of a wait in seconds.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def memory(self) -> Tensor: ...

    def new_queue(self) -> WorkQueue:
        """Create a queue."""

    def put(self, start: int, stop: int, peer: int, word: int, value: int) -> None:
        """Copy bytes [start, stop) of this rank's memory to the same offset at `peer`, then set `word` there. Later
        work on this queue may overwrite the source."""

    def signal(self, peer: int, word: int, value: int) -> None:
        """Set `word` at `peer`, after all earlier puts of this queue to that peer."""

    def wait(self, peer: int, word: int, value: int) -> None:
        """Wait until `peer` has set this rank's `word` to exactly `value`; its earlier puts are then visible."""

    def close(self) -> None:
        """Free the memory. Call on all ranks, when no call is in progress."""


class SlotWork(dist.Work):
    """A call with `async_op=True`."""

    def __init__(self, done: Completion) -> None:
        super().__init__()
        self._done = done

    def wait(self, timeout: Any = None) -> bool:
        self._done.wait()
        return True

    def is_completed(self) -> bool:
        return self._done.is_done()


class Exchange:
    """The calls of one of KINDS: their queue, number, bytes and signal words."""

    def __init__(self, transport: Transport, kind: str, backend: str, bytes_by_collective: Counter[str]) -> None:
        self.transport, self._queue, self._calls = transport, transport.new_queue(), 0
        self._kind, self._backend, self._bytes = kind, backend, bytes_by_collective
        first = 2 * KINDS.index(kind) * transport.size
        self._ready, self._full = first, first + transport.size

    def run(self, steps: Callable[[int], None], whole: Tensor, async_op: bool) -> dist.Work | None:
        """Run `steps` as the next call, with its number as the argument. `whole`: its largest tensor."""
        self._calls += 1
        number, size, dtype = self._calls, whole.numel() * whole.itemsize, str(whole.dtype).removeprefix("torch.")
        ranks = self.transport.size
        name = ANNOTATION.format(kind=self._kind, size=size, dtype=dtype, ranks=ranks, backend=self._backend)
        self._bytes[self._kind] += size

        def work() -> None:
            with torch.no_grad():
                steps(number)

        with record_function(name):
            done = self._queue.submit(work)
            if async_op:
                return SlotWork(done)
            done.wait()
            return None

    def peers(self) -> Iterator[int]:
        """All other ranks, starting after this one, so that ranks do not all write to the same peer."""
        rank, size = self.transport.rank, self.transport.size
        return ((rank + distance) % size for distance in range(1, size))

    def handshake(self, number: int) -> None:
        """Allow all peers to write here, and wait until all peers allow it too."""
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
    """Outputs are buffers in the transport's memory, used in turn; a buffer is free when torch drops its tensor."""

    def __init__(self, exchange: Exchange, heap: Heap) -> None:
        self._exchange, self._heap = exchange, heap
        self._next_buffer = 0
        self._held: list[weakref.ref[Tensor] | None] = [None] * len(heap.gather_starts)

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A buffer for an output. Call in the same order on all ranks, so that it has the same offset on each.

        Raises:
            ValueError: it is larger than the heap's buffers.
            RuntimeError: all buffers are in use.
        """
        shape = [int(length) for length in size]
        wanted = math.prod(shape) * dtype.itemsize
        if wanted > self._heap.gather:
            raise ValueError(f"an all-gather of {wanted} bytes does not fit into buffers of {self._heap.gather} bytes")
        index, self._next_buffer = self._next_buffer, (self._next_buffer + 1) % len(self._held)
        holder = self._held[index]
        if holder is not None and holder() is not None:
            raise RuntimeError(f"more than {len(self._held)} outputs of all-gathers are in use at the same time")
        start = self._heap.gather_starts[index]
        output = self._exchange.transport.memory[start : start + wanted].view(dtype).view(shape)
        self._held[index] = weakref.ref(output)
        return output

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gather `input_tensor` of all ranks into `output_tensor`, which must come from `allocate`."""
        exchange, transport = self._exchange, self._exchange.transport
        _check(output_tensor, input_tensor, group, transport)
        base = output_tensor.data_ptr() - transport.memory.data_ptr()
        if base not in self._heap.gather_starts:
            raise ValueError("the output of an all-gather must come from `allocate`")
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

        return exchange.run(steps, output_tensor, async_op)


class SlotReduceScatter(ReduceScatter):
    """Chunks arrive in a scratch buffer of the transport's memory; inputs and outputs are ordinary tensors."""

    def __init__(self, exchange: Exchange, heap: Heap) -> None:
        self._exchange, self._heap = exchange, heap

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
            raise ValueError(f"gradients can only be summed, but {op} was requested")
        if not input_tensor.dtype.is_floating_point:
            raise ValueError(f"{input_tensor.dtype} cannot be summed here; only floating point can")
        whole = input_tensor.numel() * input_tensor.itemsize
        if whole > self._heap.scatter:
            raise ValueError(f"a sum of {whole} bytes does not fit into a scratch of {self._heap.scatter} bytes")
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

        return exchange.run(steps, input_tensor, async_op)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of `dtype` are added; the sum is rounded once."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def _check(whole: Tensor, part: Tensor, group: dist.ProcessGroup, transport: Transport) -> None:
    if group.size() != transport.size or group.rank() != transport.rank:
        raise ValueError(f"this transport serves {transport.size} ranks, but the group has {group.size()}")
    if whole.dtype != part.dtype:
        raise ValueError(f"the full tensor is {whole.dtype}, but a rank's part of it {part.dtype}")
    if whole.numel() != transport.size * part.numel():
        raise ValueError(f"{transport.size} parts of {part.numel()} numbers do not add up to {whole.numel()} numbers")
    if not (whole.is_contiguous() and part.is_contiguous()):
        raise ValueError("tensors must be contiguous")


class SlotCollectives:
    """The two collectives of `fully_shard` over a transport. `bytes_by_collective`: bytes so far, by kind of call."""

    def __init__(self, transport: Transport, heap: Heap, backend: str) -> None:
        self._transport = transport
        self.bytes_by_collective: Counter[str] = Counter()
        calls = [Exchange(transport, kind, backend, self.bytes_by_collective) for kind in KINDS]
        self.all_gather, self.reduce_scatter = SlotAllGather(calls[0], heap), SlotReduceScatter(calls[1], heap)

    def install(self, module: FSDPModule) -> None:
        """Use these collectives for the parameters and gradients of `module`."""
        module.set_custom_all_gather(self.all_gather)
        module.set_custom_reduce_scatter(self.reduce_scatter)

    def close(self) -> None:
        """Free the memory. Call on all ranks, when no call is in progress."""
        self._transport.close()
