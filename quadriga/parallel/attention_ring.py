"""Context parallelism by passing keys and values around a ring (arXiv 2310.01889).

Each rank keeps its queries. It receives the keys and values of the other ranks, one rank's at a time, while the kernel
computes with those received before. Results are merged exactly. In the backward pass keys and values go around again,
followed by their gradients in float32, until the gradients are back at their rank.

Torch's own ring (`torch.distributed.tensor.experimental`) is not used: it is private, configured by process-wide
variables, repeats no heads for float32 on CUDA, and sends the gradients once more than needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.comm.call_recorder import SENDS_INSIDE
from quadriga.parallel.attention_kernels import attend, attend_backward, empty_result, merge, register_gradients
from quadriga.parallel.sequence_cut import SequenceCut

c10d = torch.ops._c10d_functional

EVERYTHING = slice(None)


class RingAttention(nn.Module):
    def __init__(self, core: nn.Module, cut: SequenceCut, group_name: str) -> None:
        super().__init__()
        self.cut, self.group_name = cut, group_name

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = ring_attention(q, k, v, self.cut.rank, self.cut.size, self.cut.chunks, self.group_name)
        return out


@torch.library.custom_op("quadriga::ring_attention", mutates_args=())
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, rank: int, size: int, chunks: int, group_name: str
) -> tuple[Tensor, Tensor]:
    """Causal attention of a rank's part of a sequence to the whole sequence: (out, lse).

    It is a custom operation so that the compiler sees the same graph on all ranks, and so that recompute per operation
    saves only the result, and not the received keys and values.

    Args:
        q: (batch, heads, part, head_dim). k, v: (batch, kv_heads, part, head_dim).
        rank, size, chunks: see `SequenceCut`.

    Returns:
        out: (batch, heads, part, head_dim), dtype of q. lse: (batch, heads, part), float32.
    """
    kv = torch.stack((k, v))
    coming = _send_to_next(kv, rank, size, group_name)
    out, lse = attend(q, k, v, causal=True)
    out = out.float()
    for step in range(1, size):
        kv = c10d.wait_tensor(coming)
        if step < size - 1:
            coming = _send_to_next(kv, rank, size, group_name)
        visible = _visible_keys(step, rank, chunks, q.shape[2])
        if visible is not None:
            rows, keys = visible
            new = attend(q[:, :, rows], kv[0][:, :, keys], kv[1][:, :, keys], causal=False)
            out[:, :, rows], lse[:, :, rows] = merge((out[:, :, rows], lse[:, :, rows]), new)
    result, result_lse = empty_result(q)
    return result.copy_(out), result_lse.copy_(lse)


@torch.library.custom_op("quadriga::ring_attention_backward", mutates_args=())
def ring_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rank: int,
    size: int,
    chunks: int,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtypes, summed in float32."""
    kv = torch.stack((k, v))
    coming = _send_to_next(kv, rank, size, group_name)
    dq, dk, dv = (x.float() for x in attend_backward(grad, q, k, v, out, lse, causal=True))
    kv_grads_in_flight: Tensor | None = None
    for step in range(1, size):
        kv = c10d.wait_tensor(coming)
        if step < size - 1:
            coming = _send_to_next(kv, rank, size, group_name)
        passing = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
        visible = _visible_keys(step, rank, chunks, q.shape[2])
        if visible is not None:
            rows, keys = visible
            seen = (kv[0][:, :, keys], kv[1][:, :, keys])
            inputs = (grad[:, :, rows], q[:, :, rows], *seen, out[:, :, rows], lse[:, :, rows])
            part, passing[0][:, :, keys], passing[1][:, :, keys] = attend_backward(*inputs, causal=False)
            dq[:, :, rows] += part
        if kv_grads_in_flight is not None:
            passing += c10d.wait_tensor(kv_grads_in_flight)
        # The last rank to receive keys and values is the one before their own rank, so this send returns the gradients.
        kv_grads_in_flight = _send_to_next(passing, rank, size, group_name)
    kv_grads = c10d.wait_tensor(kv_grads_in_flight)
    return _rounded(dq, q), _rounded(dk + kv_grads[0], k), _rounded(dv + kv_grads[1], v)


def _visible_keys(step: int, rank: int, chunks: int, length: int) -> tuple[slice, slice] | None:
    """The slices of this rank's `length` queries and of the keys that they see, for the keys of the rank that is `step`
    places before this one on the ring; None if they see none.

    With two chunks: if that rank comes before this one in the sequence (the ring has not wrapped around yet), all
    queries see its early chunk, and none its late chunk, which lies behind both chunks of this rank. Otherwise only the
    late chunk of queries sees any keys, and it sees all.
    """
    is_earlier = step <= rank
    if chunks == 1:
        return (EVERYTHING, EVERYTHING) if is_earlier else None
    half = length // 2
    return (EVERYTHING, slice(0, half)) if is_earlier else (slice(half, None), EVERYTHING)


def _send_to_next(tensor: Tensor, rank: int, size: int, group_name: str) -> Tensor:
    """Start a send to the next rank. Returns what the rank before sends, valid after `wait_tensor`.

    It is an all-to-all in which each rank has one receiver, so the network carries point-to-point messages.
    """
    rows = tensor.shape[0]
    sent = [rows if other == (rank + 1) % size else 0 for other in range(size)]
    received = [rows if other == (rank - 1) % size else 0 for other in range(size)]
    return c10d.all_to_all_single(tensor, received, sent, group_name)


def _rounded(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient.to(like.dtype).contiguous()  # as the fake kernel declares


register_gradients(ring_attention, ring_attention_backward)


def _sends(q: Tensor, k: Tensor, v: Tensor, rank: int, size: int, *ring: Any) -> Iterator[tuple[str, int]]:
    for _ in range(size - 1):
        yield "all_to_all", 2 * k.numel() * k.itemsize


def _backward_sends(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, rank: int, size: int, *ring: Any
) -> Iterator[tuple[str, int]]:
    for _ in range(size - 1):
        yield "all_to_all", 2 * k.numel() * k.itemsize
        yield "all_to_all", 2 * k.numel() * torch.float32.itemsize


SENDS_INSIDE["quadriga::ring_attention"] = _sends
SENDS_INSIDE["quadriga::ring_attention_backward"] = _backward_sends
