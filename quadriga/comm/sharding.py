"""The collectives of `fully_shard` by backend: torch's, on ordinary or symmetric memory, or Quadriga's."""

from __future__ import annotations

from collections import Counter
from importlib import import_module
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from quadriga.comm.backend import BACKENDS
from quadriga.comm.collectives import gather_in_symmetric_memory
from quadriga.comm.heap import Heap
from quadriga.comm.slots import SlotCollectives


class ShardCollectives(Protocol):
    """Replaces torch's collectives. `bytes_by_collective`: bytes so far by kind of call, if they are counted."""

    bytes_by_collective: Counter[str]

    def install(self, module: FSDPModule) -> None:
        """Use these collectives for the parameters and gradients of `module`."""

    def close(self) -> None:
        """Free the memory. Call on all ranks, when no call is in progress."""


class NcclSymmetric:
    """NCCL's collectives, on buffers that torch allocates in NCCL's symmetric memory."""

    def __init__(self) -> None:
        self.bytes_by_collective: Counter[str] = Counter()

    def install(self, module: FSDPModule) -> None:
        gather_in_symmetric_memory(module)

    def close(self) -> None:
        pass


def open_shard_collectives(
    backend: str, group: dist.ProcessGroup, heap: Heap | None, device: torch.device, timeout_seconds: float
) -> ShardCollectives | None:
    """The collectives of a run whose parameters are sharded over `group`; None for torch's own.

    A heap is allocated here completely. Call on all ranks of the run together, when no other collective is in progress,
    because NVSHMEM is initialized here.
    """
    if backend == "nccl-symm":
        return NcclSymmetric()
    place = BACKENDS[backend].transport
    if heap is None or place is None:
        return None
    module, _, name = place.partition(":")
    transport = getattr(import_module(module), name)(group, heap.bytes, device, timeout_seconds)
    return SlotCollectives(transport, heap, backend)
