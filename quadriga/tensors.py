"""Shards of tensors, and the tensors in nested lists. Every package that handles sharded parameters may import this."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def to_local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor, which shares its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def offset_of(tensor: Tensor) -> tuple[int, ...]:
    """The index in the whole tensor of the first element of this rank's shard, which is a box of it."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim()
    return tuple(compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)[1])


def plain_data(tensor: Tensor) -> Tensor:
    """The plain tensor inside of a tensor subclass of torchao, which shares its memory; any other tensor as it is."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor
    inner: Tensor = getattr(tensor, tensor.__tensor_flatten__()[0][0])
    return inner


def tensors_in(item: Any) -> Iterator[Tensor]:
    """The tensors in `item`, a tensor or nested lists and tuples of them."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, list | tuple):
        for one in item:
            yield from tensors_in(one)


def from_local_like(local: Tensor, whole: Tensor) -> Tensor:
    """A DTensor with this local shard, and otherwise as `whole`; if that is no DTensor, `local` as it is.

    `local` stays where it is, as host memory that holds the shard of a GPU; `DTensor.from_local` would copy it to the
    devices of the mesh.
    """
    if not isinstance(whole, DTensor):
        return local
    meta = TensorMeta(whole.shape, whole.stride(), local.dtype)
    spec = DTensorSpec(whole.device_mesh, whole.placements, tensor_meta=meta)
    return DTensor(local, spec, requires_grad=local.requires_grad)
