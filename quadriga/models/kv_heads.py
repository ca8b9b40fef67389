"""Keys and values that several query heads share (GQA, arXiv 2305.13245), for kernels that do not know of it.

Query head h of H reads key and value head h // (H / KV). Every place that repeats heads, whatever the device, does so
by these two functions.
"""

from __future__ import annotations

from torch import Tensor


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """(batch, kv_heads, seq, head_dim) -> (batch, heads, seq, head_dim): each head as often as query heads read it."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_kv(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient of `repeat_kv`: (batch, heads, seq, head_dim) -> (batch, kv_heads, seq, head_dim)."""
    return grad.unflatten(1, (kv_heads, -1)).sum(2)


def repeats_kv(device_type: str, itemsize: int, heads: int, kv_heads: int) -> bool:
    """Whether PyTorch's attention has no fast kernel for shared heads here: in float32 on CUDA.

    Flash attention has no float32 and the memory-efficient kernel no GQA; unrepeated heads would fall to the kernel
    that stores the whole seq x seq matrix. `itemsize`: bytes of a number.
    """
    return heads != kv_heads and device_type == "cuda" and itemsize >= 4
