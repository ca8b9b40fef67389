"""The few collectives that Quadriga calls itself, for torch 2.11 and newer. On one rank they return their input."""

from __future__ import annotations

import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
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
    """`tensor` reduced over `group`, as a new tensor."""
    if group.size() == 1:
        return tensor
    result = tensor.clone()
    dist.all_reduce(result, op=op, group=group)
    return result


def group_named(name: str) -> dist.ProcessGroup | None:
    """The process group with this torch name; None if there is none."""
    names = distributed_c10d._world.pg_names
    return next((group for group, own in names.items() if own == name), None)


def gather_in_symmetric_memory(module: FSDPModule) -> None:
    """Let NCCL's collectives of `module` use buffers in its symmetric memory; torch 2.11 has no such call."""
    module.set_symm_mem_for_comm(backend="NCCL")


def has_symmetric_memory() -> bool:
    """Whether this torch has the call of `gather_in_symmetric_memory`."""
    return hasattr(FSDPModule, "set_symm_mem_for_comm")


def split_collectives_of(group: dist.ProcessGroup) -> None:
    """Let the compiler split the collectives of `group`, which asynchronous tensor parallelism overlaps with products.

    torch deprecates the call that it makes here, but up to 2.13 its compiler passes over a group without it, in silence
    (https://github.com/pytorch/pytorch/issues/193027).
    """
    enable = getattr(symmetric_memory, "enable_symm_mem_for_group", None)
    if enable is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            enable(group.group_name)


HOST = "host"  # description of groups whose collectives wait for disks and have their own time limit


def set_timeout(timeout: timedelta) -> None:
    """Set the time limit of collectives in all process groups except the HOST ones.

    torch has a public function for this from 2.14 on; the private one before is the same in 2.11 to 2.13.
    """
    set_group_timeout = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout
    if world_size() > 1:
        for group in list(distributed_c10d._world.pg_map):
            if group.group_desc != HOST:
                set_group_timeout(timeout, group)
