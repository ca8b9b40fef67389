"""Context parallelism by passing keys and values around a ring (arXiv 2310.01889).

Each rank holds its queries still. The keys and values of the ranks pass by, one rank's at a time, while the kernel
works on those that came before; results are merged exactly. In the backward pass they pass by again, and their
gradients travel along with them, in float32, until they are home.

Not torch's own ring (`torch.distributed.tensor.experimental`): it is private, steered by variables of the whole
process, repeats no heads for float32 on CUDA, and sends the gradients once more than needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quadriga.comm.call_recorder import SENDS_INSIDE
from quadriga.parallel.attention_kernels import attend, attend_backward, empty_gradients, empty_result, merge
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
    """Causal attention of a rank's part of a sequence to the whole of it: (out, lse).

    An operation of its own, so that the compiler sees the same graph on all ranks, and that recompute per operation
    keeps the result alone and not what passed by.

    Args:
        q: (batch, heads, part, head_dim). k, v: (batch, kv_heads, part, head_dim).
        rank, size, chunks: see `SequenceCut`.
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
            ours, theirs = visible
            new = attend(q[:, :, ours], kv[0][:, :, theirs], kv[1][:, :, theirs], causal=False)
            out[:, :, ours], lse[:, :, ours] = merge((out[:, :, ours], lse[:, :, ours]), new)
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
    """Gradients of q, k and v, added up in float32."""
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
            ours, theirs = visible
            seen = (kv[0][:, :, theirs], kv[1][:, :, theirs])
            mine = (grad[:, :, ours], q[:, :, ours], *seen, out[:, :, ours], lse[:, :, ours])
            part, passing[0][:, :, theirs], passing[1][:, :, theirs] = attend_backward(*mine, causal=False)
            dq[:, :, ours] += part
        if kv_grads_in_flight is not None:
            passing += c10d.wait_tensor(kv_grads_in_flight)
        # The last rank that keys and values come to is the one before their home.
        kv_grads_in_flight = _send_to_next(passing, rank, size, group_name)
    kv_grads = c10d.wait_tensor(kv_grads_in_flight)
    return _rounded(dq, q), _rounded(dk + kv_grads[0], k), _rounded(dv + kv_grads[1], v)


def _visible_keys(step: int, rank: int, chunks: int, length: int) -> tuple[slice, slice] | None:
    """Which of our `length` queries see which keys of the rank that is `step` before us on the ring; None: no two.

    Of a rank before us in the sequence (the ring has not closed yet) all queries see the early chunk, and none the
    late one, which stands behind our own. Of a rank behind us only our late chunk sees anything, and it sees both.
    """
    is_before_us = step <= rank
    if chunks == 1:
        return (EVERYTHING, EVERYTHING) if is_before_us else None
    half = length // 2
    return (EVERYTHING, slice(0, half)) if is_before_us else (slice(half, None), EVERYTHING)


def _send_to_next(tensor: Tensor, rank: int, size: int, group_name: str) -> Tensor:
    """Start to send to the next rank; what comes from the rank before us, there after `wait_tensor`.

    An all-to-all in which each rank has but one receiver: point to point on the wire.
    """
    rows = tensor.shape[0]
    sent = [rows if other == (rank + 1) % size else 0 for other in range(size)]
    received = [rows if other == (rank - 1) % size else 0 for other in range(size)]
    return c10d.all_to_all_single(tensor, received, sent, group_name)


def _rounded(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient.to(like.dtype).contiguous()  # as the kernel without numbers promises


@ring_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, rank: int, size: int, chunks: int, group_name: str) -> tuple[Tensor, Tensor]:
    return empty_result(q)


@ring_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_gradients(q, k, v)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.ring = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *ring_attention_backward(grad, *ctx.saved_tensors, *ctx.ring), None, None, None, None


ring_attention.register_autograd(_backward, setup_context=_setup_context)


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
