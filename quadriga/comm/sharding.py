"""Which collectives `fully_shard` uses over a backend: torch's own, on ordinary or symmetric memory, or ours."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from quadriga.comm.collectives import gather_in_symmetric_memory
from quadriga.comm.heap import Heap
from quadriga.comm.host_slots import HostTransport
from quadriga.comm.nvshmem import NvshmemTransport
from quadriga.comm.slots import SlotCollectives


class ShardCollectives(Protocol):
    """What takes the place of torch's own. `bytes_by_collective`: bytes so far, where they are counted."""

    bytes_by_collective: Counter[str]

    def install(self, module: FSDPModule) -> None:
        """Let the parameters and gradients of `module` go this way."""

    def close(self) -> None:
        """Give back what was taken. Call on all ranks, when no call is on its way."""


class NcclSymmetric:
    """NCCL's collectives, on buffers that torch takes from NCCL's symmetric memory."""

    def __init__(self) -> None:
        self.bytes_by_collective: Counter[str] = Counter()

    def install(self, module: FSDPModule) -> None:
        gather_in_symmetric_memory(module)

    def close(self) -> None:
        pass


def open_shard_collectives(
    backend: str, group: dist.ProcessGroup, heap: Heap | None, device: torch.device, timeout_seconds: float
) -> ShardCollectives | None:
    """The collectives of a run whose parameters are sharded over `group`; None where torch's own serve.

    Those that want a heap take it all here. Call on all ranks of the run together, before any other of their
    collectives can be under way: NVSHMEM starts within it.
    """
    if backend == "nccl-symm":
        return NcclSymmetric()
    if heap is None:
        return None
    if backend == "nvshmem":
        return SlotCollectives(NvshmemTransport(group, heap.bytes, device), heap, backend)
    return SlotCollectives(HostTransport(group, heap.bytes, timeout_seconds), heap, backend)
