"""Repeats the heads of keys and values (GQA, arXiv 2305.13245) for kernels that do not support shared heads.

Query head h of H reads key and value head h // (H / KV). All code that repeats heads, on any device, uses these two
functions.
"""

from __future__ import annotations

from torch import Tensor


def repeat_kv(x: Tensor, heads: int) -> Tensor:
    """(batch, kv_heads, seq, head_dim) -> (batch, heads, seq, head_dim): one copy of a head per query head."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_kv(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient of `repeat_kv`: (batch, heads, seq, head_dim) -> (batch, kv_heads, seq, head_dim)."""
    return grad.unflatten(1, (kv_heads, -1)).sum(2)


def repeats_kv(device_type: str, itemsize: int, heads: int, kv_heads: int) -> bool:
    """Whether heads must be repeated, because PyTorch has no fast attention for shared heads: in float32 on CUDA.

    Flash attention does not support float32, and the memory-efficient kernel does not support GQA. Without repeated
    heads, PyTorch would use the kernel that stores the whole seq x seq matrix. `itemsize`: bytes per element.
    """
    return heads != kv_heads and device_type == "cuda" and itemsize >= 4
