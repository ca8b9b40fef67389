"""The global gradient norm, and gradient clipping by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from quadriga.tensors import to_local

Reduce = Callable[[Tensor], Tensor]
EPSILON = 1e-6  # keeps the division finite; the value of torch.nn.utils.clip_grad_norm_
BLOCK = 1 << 20  # elements that are converted to float32 at a time


@dataclass(frozen=True)
class GradientNorms:
    """`total`: the norm over all gradients and all ranks that hold a part of them, before clipping; float32, shape ().

    `local`: for each gradient, in the given order, the norm of this rank's shard: float64, shape (). On a CPU the norms
    of its rows: float32, shape (rows,); of a vector float64, shape (1,).
    """

    total: Tensor
    local: list[Tensor]

    def first_not_finite(self) -> Tensor:
        """The index of the first gradient with a NaN or infinite element: int64, shape (); -1 if there is none."""
        if not self.local:
            return torch.tensor(-1)
        if self.local[0].device.type == "cpu":
            found = (number for number, norms in enumerate(self.local) if not norms.isfinite().all())
            return torch.tensor(next(found, -1))
        finite = torch.stack(self.local).isfinite().int()
        return torch.where(finite.all(), -1, finite.argmin())


@torch.no_grad()
def scale_gradients(gradients: list[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales gradients of this global norm to `max_norm`, in place, if that is above 0 and exceeded.

    The factor is min(1, max_norm / (norm + EPSILON)). There is no device synchronization.
    """
    if max_norm > 0 and gradients:
        local = [to_local(gradient) for gradient in gradients]
        scale = (max_norm / (norm + EPSILON)).clamp(max=1.0)
        torch._foreach_mul_(local, scale.to(local[0].device))


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def gradient_norms(gradients: Iterable[Tensor], sum_over_stages: Reduce | None = None) -> GradientNorms:
    """The global L2 norm of the gradients, and the local norms that it is computed from.

    Gradients can be plain tensors or DTensors over any meshes, of any float dtype. `sum_over_stages` sums a float64
    scalar over pipeline stages, which have different parameters. Raises ValueError for a Partial gradient.

    Squares are summed in float64 (on CPU: the squares of the norms of rows). The error of a float32 norm of a large
    matrix depends on how the matrix is sharded. It would scale all gradients in the same direction, and the losses of
    two layouts would diverge faster than by the order of their sums alone.
    """
    gradients = list(gradients)
    local = _local_norms([to_local(gradient) for gradient in gradients])
    by_mesh: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for gradient, norms in zip(gradients, local, strict=True):
        by_mesh[_shard_axes(gradient)].append(norms)
    squares = [_sum_over_shards(_sum_of_squares(norms), mesh, dims) for (mesh, dims), norms in by_mesh.items()]
    square = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
    return GradientNorms((sum_over_stages(square) if sum_over_stages else square).sqrt().float(), local)


def _shard_axes(gradient: Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    """The mesh of a gradient and the mesh axes that shard it. Replicas along other axes are equal and count once."""
    if not isinstance(gradient, DTensor):
        return None, ()
    if any(placement.is_partial() for placement in gradient.placements):
        raise ValueError("a gradient has the placement Partial: reduce it before taking the norm")
    cut = tuple(axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate())
    return gradient.device_mesh, cut


def _local_norms(tensors: list[Tensor]) -> list[Tensor]:
    if not tensors:
        return []
    if tensors[0].device.type == "cpu":
        buffer = torch.empty(BLOCK)
        return [_row_norms(tensor, buffer) for tensor in tensors]
    return list(torch._foreach_norm(tensors, 2.0, torch.float64))  # one kernel, accumulates in float64


def _sum_of_squares(norms: list[Tensor]) -> Tensor:
    joined = torch.cat(norms) if norms[0].dim() else torch.stack(norms)
    return joined.double().square().sum()


def _row_norms(tensor: Tensor, buffer: Tensor) -> Tensor:
    """The norms of the rows, in float32; of a vector, its norm in float64. `buffer`: float32, for converted rows."""
    # Float32 is enough for the norm of a row or of its shard: the errors of thousands of rows cancel, and if matrices
    # are cut between rows, the errors are the same on every layout. Converting whole matrices would take longer than
    # the norm itself.
    if tensor.dim() < 2:
        return torch.linalg.vector_norm(tensor, dtype=torch.float64).unsqueeze(0)
    rows = tensor.flatten(0, -2)
    if tensor.dtype == torch.float32 or rows.shape[-1] > len(buffer):
        return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32)
    # The kernel takes ten times as long on bfloat16 as on a converted block in the cache.
    norms = []
    for block in rows.split(len(buffer) // max(1, rows.shape[-1])):
        converted = buffer[: block.numel()].view_as(block).copy_(block)
        norms.append(torch.linalg.vector_norm(converted, dim=-1))
    return torch.cat(norms)


def _sum_over_shards(square: Tensor, mesh: DeviceMesh | None, axes: tuple[int, ...]) -> Tensor:
    for axis in axes:
        assert mesh is not None
        if mesh.size(axis) > 1:
            dist.all_reduce(square, group=mesh.get_group(axis))
    return square
