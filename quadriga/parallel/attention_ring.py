"""Context parallelism by passing keys and values around a ring (arXiv 2310.01889).

Each rank keeps its queries. It receives the keys and values of the other ranks, one rank's at a time, while the kernel
computes with those received before. Results are merged exactly. In the backward pass keys and values go around again,
followed by their gradients in float32, until the gradients are back at their rank.

Torch's own ring (`torch.distributed.tensor.experimental`) is not used: it is private, configured by process-wide
variables, repeats no heads for float32 on CUDA, and sends the gradients once more than needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quadriga.comm.call_recorder import SENDS_INSIDE
from quadriga.parallel.attention_documents import NOTHING, attend_documents, attend_documents_backward
from quadriga.parallel.attention_kernels import attend, attend_backward, empty_result, merge, register_gradients
from quadriga.parallel.sequence_cut import SequenceCut

c10d = torch.ops._c10d_functional

EVERYTHING = slice(None)


class RingAttention(nn.Module):
    def __init__(self, core: nn.Module, cut: SequenceCut, group_name: str) -> None:
        super().__init__()
        self.cut, self.group_name = cut, group_name

    def forward(self, q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None) -> Tensor:
        out, _ = ring_attention(q, k, v, borders, self.cut.rank, self.cut.size, self.cut.chunks, self.group_name)
        return out


@torch.library.custom_op("quadriga::ring_attention", mutates_args=())
def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, rank: int, size: int, chunks: int, group_name: str
) -> tuple[Tensor, Tensor]:
    """Causal attention of a rank's part of a sequence to the whole sequence: (out, lse).

    It is a custom operation so that the compiler sees the same graph on all ranks, and so that recompute per operation
    saves only the result, and not the received keys and values.

    Args:
        q: (batch, heads, part, head_dim). k, v: (batch, kv_heads, part, head_dim).
        borders: of documents (`attention_documents`), which do not see each other; None: one document per row.
        rank, size, chunks: see `SequenceCut`.

    Returns:
        out: (batch, heads, part, head_dim), dtype of q. lse: (batch, heads, part), float32.
    """
    kv = torch.stack((k, v))
    coming = _send_to_next(kv, rank, size, group_name)
    cut = SequenceCut(rank, size, chunks)
    out, lse = _attend_own(q, k, v, borders, cut)
    for step in range(1, size):
        kv = c10d.wait_tensor(coming)
        if step < size - 1:
            coming = _send_to_next(kv, rank, size, group_name)
        for meeting in _meetings(step, cut, q.shape[2], by_chunk=borders is not None):
            _merge_into(out, lse, meeting, _attend(q, kv[0], kv[1], borders, meeting))
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
    borders: Tensor | None,
    rank: int,
    size: int,
    chunks: int,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtypes, summed in float32."""
    kv = torch.stack((k, v))
    coming = _send_to_next(kv, rank, size, group_name)
    cut, by_chunk = SequenceCut(rank, size, chunks), borders is not None
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))

    def add_gradients(kv: Tensor, dkv: Iterable[Tensor], step: int) -> None:
        for meeting in _meetings(step, cut, q.shape[2], by_chunk=by_chunk):
            part = _attend_backward(grad, q, kv[0], kv[1], out, lse, borders, meeting)
            for total, x, place in zip((dq, *dkv), part, (meeting.queries, meeting.keys, meeting.keys), strict=True):
                total[:, :, place] += x

    add_gradients(kv, (dk, dv), 0)
    kv_grads_in_flight: Tensor | None = None
    for step in range(1, size):
        kv = c10d.wait_tensor(coming)
        if step < size - 1:
            coming = _send_to_next(kv, rank, size, group_name)
        passing = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
        add_gradients(kv, passing, step)
        if kv_grads_in_flight is not None:
            passing += c10d.wait_tensor(kv_grads_in_flight)
        # The last rank to receive keys and values is the one before their own rank, so this send returns the gradients.
        kv_grads_in_flight = _send_to_next(passing, rank, size, group_name)
    kv_grads = c10d.wait_tensor(kv_grads_in_flight)
    return _rounded(dq, q), _rounded(dk + kv_grads[0], k), _rounded(dv + kv_grads[1], v)


class _Meeting(NamedTuple):
    """Queries of this rank and keys of a rank. With borders, `q_start` and `k_start` are their first positions in the
    whole sequence; else `causal` says how they meet."""

    queries: slice
    keys: slice
    causal: bool = False
    q_start: int = 0
    k_start: int = 0


def _meetings(step: int, cut: SequenceCut, length: int, *, by_chunk: bool) -> list[_Meeting]:
    """How this rank's `length` queries meet the keys of the rank that is `step` places before this one on the ring.

    With two chunks: if that rank comes before this one in the sequence (the ring has not wrapped around yet), all
    queries see its early chunk, and none its late chunk, which lies behind both chunks of this rank. Otherwise only the
    late chunk of queries sees any keys, and it sees all.

    `by_chunk`: one meeting for each chunk of queries and of keys, as documents need it. Of the rank's own keys, those
    of the same chunk come first, because every query sees some of them.
    """
    if by_chunk:
        each = length // cut.chunks
        places = [slice(number * each, (number + 1) * each) for number in range(cut.chunks)]
        theirs = replace(cut, rank=(cut.rank - step) % cut.size).starts(length)
        return [
            _Meeting(places[mine], places[other], q_start=q_start, k_start=theirs[other])
            for mine, q_start in enumerate(cut.starts(length))
            for other in reversed(range(cut.chunks))
            if theirs[other] <= q_start
        ]
    if step == 0:
        return [_Meeting(EVERYTHING, EVERYTHING, causal=True)]
    is_earlier = step <= cut.rank
    if cut.chunks == 1:
        return [_Meeting(EVERYTHING, EVERYTHING)] if is_earlier else []
    half = length // 2
    return [_Meeting(EVERYTHING, slice(0, half)) if is_earlier else _Meeting(slice(half, None), EVERYTHING)]


def _attend_own(q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, cut: SequenceCut) -> tuple[Tensor, Tensor]:
    """(out, lse) of the rank's queries to its own keys; out is in float32."""
    first, *others = _meetings(0, cut, q.shape[2], by_chunk=borders is not None)
    if borders is None:
        out, lse = _attend(q, k, v, borders, first)
        return out.float(), lse
    out, lse = empty_result(q, torch.float32)
    out.zero_()
    lse.fill_(NOTHING)
    for meeting in (first, *others):
        _merge_into(out, lse, meeting, _attend(q, k, v, borders, meeting))
    return out, lse


def _attend(q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, meeting: _Meeting) -> tuple[Tensor, Tensor]:
    given = q[:, :, meeting.queries], k[:, :, meeting.keys], v[:, :, meeting.keys]
    if borders is None:
        return attend(*given, causal=meeting.causal)
    return attend_documents(*given, borders, meeting.q_start, meeting.k_start)


def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor | None, meeting: _Meeting
) -> tuple[Tensor, Tensor, Tensor]:
    rows, keys = meeting.queries, meeting.keys
    given = (grad[:, :, rows], q[:, :, rows], k[:, :, keys], v[:, :, keys], out[:, :, rows], lse[:, :, rows])
    if borders is None:
        return attend_backward(*given, causal=meeting.causal)
    return attend_documents_backward(*given, borders, meeting.q_start, meeting.k_start)


def _merge_into(out: Tensor, lse: Tensor, meeting: _Meeting, new: tuple[Tensor, Tensor]) -> None:
    rows = meeting.queries
    out[:, :, rows], lse[:, :, rows] = merge((out[:, :, rows], lse[:, :, rows]), new)


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


def _sends(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None, rank: int, size: int, *ring: Any
) -> Iterator[tuple[str, int]]:
    for _ in range(size - 1):
        yield "all_to_all", 2 * k.numel() * k.itemsize


def _backward_sends(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    borders: Tensor | None,
    rank: int,
    size: int,
    *ring: Any,
) -> Iterator[tuple[str, int]]:
    for _ in range(size - 1):
        yield "all_to_all", 2 * k.numel() * k.itemsize
        yield "all_to_all", 2 * k.numel() * torch.float32.itemsize


SENDS_INSIDE["quadriga::ring_attention"] = _sends
SENDS_INSIDE["quadriga::ring_attention_backward"] = _backward_sends
