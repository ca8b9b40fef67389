"""Tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from quadriga.config.schema import Parallelism
from quadriga.models.plan import TensorCut


def apply_tensor_parallel(
    model: nn.Module, cuts: tuple[TensorCut, ...], mesh: DeviceMesh, parallelism: Parallelism
) -> None:
    """Cut `model` over the one-dimensional `mesh`, in place."""
    raise NotImplementedError


def loss_context(mesh: DeviceMesh, parallelism: Parallelism) -> Callable[[], AbstractContextManager[None]]:
    """What to enter around the loss and its backward pass."""
    return nullcontext
