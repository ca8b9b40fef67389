"""The few collectives that Quadriga calls itself, in one spelling for torch 2.11 to 2.13. Identities at one rank."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def barrier(group: dist.ProcessGroup | None = None) -> None:
    """Wait for all ranks, or for those of `group`."""
    if world_size() > 1:
        dist.barrier(group)


def all_reduced(tensor: torch.Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> torch.Tensor:
    """A new tensor, reduced over `group`; the given one stays as it is."""
    if group.size() == 1:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result, op=op, group=group)
    return result


def all_gather_numbers(numbers: torch.Tensor) -> torch.Tensor:
    """What every rank passed in, to the bit, on every rank: shape (ranks, *shape), float or integer.

    A sum of tables that are empty but for a rank's own row: its time grows with the logarithm of the number of ranks,
    where that of a gather grows with the number.
    """
    if world_size() == 1:
        return numbers.unsqueeze(0)
    table = torch.zeros(world_size(), *numbers.shape, dtype=numbers.dtype, device=numbers.device)
    table[rank()] = numbers
    dist.all_reduce(table)
    return table


def group_named(name: str) -> dist.ProcessGroup | None:
    """The process group that torch knows by this name; None where there is none."""
    names = distributed_c10d._world.pg_names
    return next((group for group, own in names.items() if own == name), None)


def gather_in_symmetric_memory(module: FSDPModule) -> None:
    """Let NCCL's collectives of `module` work on buffers in its symmetric memory; torch 2.11 has no such call."""
    module.set_symm_mem_for_comm(backend="NCCL")


def has_symmetric_memory() -> bool:
    """Whether this torch has that call."""
    return hasattr(FSDPModule, "set_symm_mem_for_comm")


HOST = "host"  # what groups are for whose collectives wait for disks, and have patience of their own


def set_timeout(timeout: timedelta) -> None:
    """How long a collective of any process group but the HOST ones may wait for a rank.

    torch offers no public name for this; the one used here is the same in 2.11 and 2.13.
    """
    if world_size() > 1:
        for group in list(distributed_c10d._world.pg_map):
            if group.group_desc != HOST:
                distributed_c10d._set_pg_timeout(timeout, group)
