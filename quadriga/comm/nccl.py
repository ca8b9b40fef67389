"""NCCL: collectives between CUDA devices. CPU tensors (small objects, offloaded gradients) still go over gloo."""

from __future__ import annotations

import torch

PROCESS_GROUP = "cpu:gloo,cuda:nccl"


def device(local_rank: int) -> torch.device:
    """The device of this rank. It becomes the current device, to which NCCL binds its communicators."""
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)
    return chosen
