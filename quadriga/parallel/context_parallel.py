"""Context parallelism."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from quadriga.config.schema import Parallelism


def apply_context_parallel(
    model: nn.Module, attention_units: tuple[str, ...], mesh: DeviceMesh, parallelism: Parallelism
) -> None:
    """Let attention see the whole sequence, of which each rank of the one-dimensional `mesh` holds a part."""
    raise NotImplementedError


def own_positions(seq_len: int, rank: int, degree: int, load_balancer: str | None) -> Tensor:
    """Where in the whole sequence the tokens of `rank` stand: int64 (seq_len / degree,), on the host."""
    return torch.arange(seq_len)
