"""Attention within documents: causal, and no token sees a token of another document.

`borders`, int32 (rows, n): for each row, the first position of each of its documents in the whole sequence, in order,
beginning with 0, then the length of the sequence, repeated. Context parallelism cuts queries and keys, never borders.

Two chunks of a sequence that do not overlap share at most one document. So attention of a chunk of queries to an
earlier chunk of keys is a rectangle: the first queries see the last keys, all of them. Within a chunk it is causal in
each document.

| where        | how                                                                                           |
|--------------|-----------------------------------------------------------------------------------------------|
| CUDA, halves | one call of flash attention 2 for all documents, by their cumulative lengths. The host reads  |
|              | no borders.                                                                                   |
| others       | one call for each document (`attention_kernels.attend`). On CUDA the host waits for borders.  |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from quadriga.parallel.attention_kernels import (
    attend,
    attend_backward,
    empty_result,
    flash_backward_of_lengths,
    flash_forward_of_lengths,
    register_gradients,
)

NOTHING = -torch.inf  # the lse of a query that sees no key


class DocumentAttention(nn.Module):
    """Attention within documents, or `core` if the batch has no borders. Without parameters."""

    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None) -> Tensor:
        if borders is None:
            plain: Tensor = self.core(q, k, v)
            return plain
        dtype = q.dtype
        if q.device.type == "cpu":
            q, k, v = q.float(), k.float(), v.float()  # as without documents, so that the saved result is not rounded
        out, _ = document_attention(q, k, v, borders)
        return out.to(dtype)


def apply_document_mask(model: nn.Module, attention_units: tuple[str, ...]) -> None:
    """Let the attention of `model` be computed document by document where a batch has borders, in place.

    The modules of `attention_units` compute the same with a mask of queries x keys."""
    for name in attention_units:
        model.set_submodule(name, DocumentAttention(model.get_submodule(name)))


@torch.library.custom_op("quadriga::document_attention", mutates_args=())
def document_attention(q: Tensor, k: Tensor, v: Tensor, borders: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of whole sequences: (out, lse). A custom operation, because it reads the borders.

    Args:
        q: (batch, heads, seq, head_dim). k, v: (batch, kv_heads, seq, head_dim). borders: as above.

    Returns:
        out: (batch, heads, seq, head_dim), dtype of q. lse: (batch, heads, seq), float32.
    """
    out, lse = attend_documents(q, k, v, borders, 0, 0)
    return out.to(q.dtype), lse


@torch.library.custom_op("quadriga::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, in their shapes and dtypes."""
    dq, dk, dv = attend_documents_backward(grad, q, k, v, out, lse, borders, 0, 0)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


register_gradients(document_attention, document_attention_backward)


def attend_documents(
    q: Tensor, k: Tensor, v: Tensor, borders: Tensor, q_start: int, k_start: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the queries from position `q_start` on to the keys from position `k_start` on.

    The keys end with the queries, or not after their beginning. A query that sees none of the keys has the result 0 and
    the lse NOTHING. Shapes and dtypes: as `attention_kernels.attend`.
    """
    if q.device.type == "cuda" and q.dtype.itemsize < 4:
        return packed_forward(flash_forward_of_lengths, q, k, v, Lengths.of(borders, q, k, q_start, k_start))
    out, lse = empty_result(q, torch.float32)
    out.zero_()
    lse.fill_(NOTHING)
    for piece in visible_pieces(borders.tolist(), q_start, q.shape[2], k_start, k.shape[2]):
        seen = piece.of_keys(k), piece.of_keys(v)
        new_out, new_lse = attend(piece.of_queries(q), *seen, causal=piece.causal)
        piece.of_queries(out).copy_(new_out)
        piece.of_queries(lse).copy_(new_lse)
    return out, lse


def attend_documents_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, borders: Tensor, q_start: int, k_start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the gradients of q, k and v that comes from these keys. `out` and `lse` are those of the complete
    attention. Queries and keys that do not meet get 0."""
    if q.device.type == "cuda" and q.dtype.itemsize < 4:
        lengths = Lengths.of(borders, q, k, q_start, k_start)
        return packed_backward(flash_backward_of_lengths, grad, q, k, v, out, lse, lengths)
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    for piece in visible_pieces(borders.tolist(), q_start, q.shape[2], k_start, k.shape[2]):
        above, queries, known_out, known_lse = (piece.of_queries(x) for x in (grad, q, out, lse))
        given = above, queries, piece.of_keys(k), piece.of_keys(v), known_out, known_lse
        new_dq, new_dk, new_dv = attend_backward(*given, causal=piece.causal)
        piece.of_queries(dq).copy_(new_dq)
        piece.of_keys(dk).copy_(new_dk)
        piece.of_keys(dv).copy_(new_dv)
    return dq, dk, dv


class AttentionPiece(NamedTuple):
    """Queries and keys of one document in one row. Causal: the queries have the last positions of the keys, and each
    sees the keys up to its own; otherwise each sees all of them. Positions count from the first of the tensor."""

    row: int
    queries: slice
    keys: slice
    causal: bool

    def of_queries(self, x: Tensor) -> Tensor:
        """A view of x, (batch, heads, queries, ...)."""
        return x[self.row : self.row + 1, :, self.queries]

    def of_keys(self, x: Tensor) -> Tensor:
        return x[self.row : self.row + 1, :, self.keys]


def visible_pieces(
    borders: Sequence[Sequence[int]], q_start: int, q_length: int, k_start: int, k_length: int
) -> Iterator[AttentionPiece]:
    """What the queries see of the keys. Each query and each key is in at most one piece."""
    q_end, k_end = q_start + q_length, k_start + k_length
    for row, marks in enumerate(borders):
        for first, after in pairwise(marks):
            if first >= q_end:
                break
            queries, keys = (max(first, q_start), min(after, q_end)), (max(first, k_start), min(after, k_end))
            if queries[0] < queries[1] and keys[0] < keys[1]:
                yield AttentionPiece(
                    row,
                    slice(queries[0] - q_start, queries[1] - q_start),
                    slice(keys[0] - k_start, keys[1] - k_start),
                    causal=keys[1] > queries[0],
                )


class Lengths(NamedTuple):
    """The pieces of all rows, for a kernel that takes rows end to end: where each piece ends, in queries and in keys.

    `queries`, `keys`: int32, (pieces + 1,), cumulative. A piece may have no queries, or no keys. `sees`: bool,
    (batch, 1, queries), the queries that see keys; `seen`: bool, (batch, 1, keys); None: all. Computed on the device.
    """

    queries: Tensor
    keys: Tensor
    causal: bool
    sees: Tensor | None
    seen: Tensor | None

    @classmethod
    def of(cls, borders: Tensor, q: Tensor, k: Tensor, q_start: int, k_start: int) -> Lengths:
        q_length, k_length = q.shape[2], k.shape[2]
        q_end, k_end = q_start + q_length, k_start + k_length
        rows = torch.arange(len(borders), dtype=torch.int32, device=borders.device).unsqueeze(1)
        # Of the document that has the first query.
        first = torch.where(borders <= q_start, borders, 0).amax(1, keepdim=True)
        places = torch.arange(k_length, device=borders.device)
        if k_end == q_end:
            # Documents before the first query have keys, but no queries.
            queries = borders.clamp(q_start, q_end) - q_start
            keys = borders.clamp(k_start, k_end) - k_start
            seen = None if k_start == q_start else (places + k_start >= first).unsqueeze(1)
            return cls(_joined(queries, rows, q_length), _joined(keys, rows, k_length), True, None, seen)
        after = torch.where(borders > q_start, borders, q_end).amin(1, keepdim=True)
        meet = first < k_end
        q_many = torch.where(meet, after.clamp(max=q_end) - q_start, 0)
        k_skipped = torch.where(meet, first.clamp(min=k_start) - k_start, k_length)
        # Three pieces for each row: keys that no query sees, the rectangle, and queries that see no key.
        none, every_q, every_k = (torch.full_like(first, size) for size in (0, q_length, k_length))
        queries = torch.cat((none, none, q_many, every_q), 1)
        keys = torch.cat((none, k_skipped, every_k, every_k), 1)
        sees = (torch.arange(q_length, device=borders.device) < q_many).unsqueeze(1)
        seen = (places >= k_skipped).unsqueeze(1)
        return cls(_joined(queries, rows, q_length), _joined(keys, rows, k_length), False, sees, seen)


def _joined(ends: Tensor, rows: Tensor, length: int) -> Tensor:
    return (ends + rows * length).flatten().to(torch.int32)


def packed_forward(
    kernel: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, lengths: Lengths
) -> tuple[Tensor, Tensor]:
    """As `attend_documents`, by a kernel that takes all rows end to end: (tokens, heads, head_dim).

    `kernel(q, k, v, lengths, q_length, k_length)` gives out (tokens, heads, head_dim) and lse (heads, tokens), with any
    value for a query that sees no key. It is an argument so that a test on CPU covers the code around it.
    """
    batch, _, q_length, _ = q.shape
    packed = (_packed(x) for x in (q, k, v))
    out, lse = kernel(*packed, lengths, q_length, k.shape[2])
    out, lse = _unpacked(out, batch), lse.unflatten(1, (batch, q_length)).transpose(0, 1)
    if lengths.sees is not None:
        out = torch.where(lengths.sees.unsqueeze(-1), out, 0)
        lse = torch.where(lengths.sees, lse, NOTHING)
    return out, lse.contiguous()


def packed_backward(
    kernel: Callable[..., tuple[Tensor, Tensor, Tensor]],
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Lengths,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend_documents_backward`. `kernel` takes the gradient and what the forward pass took and gave."""
    batch = q.shape[0]
    grad, out = (x.to(q.dtype) for x in (grad, out))
    packed = (_packed(x) for x in (grad, q, k, v, out))
    gradients = kernel(*packed, lse.transpose(0, 1).flatten(1), lengths, q.shape[2], k.shape[2])
    dq, dk, dv = (_unpacked(x, batch) for x in gradients)
    if lengths.sees is not None:
        dq = torch.where(lengths.sees.unsqueeze(-1), dq, 0)
    if lengths.seen is not None:
        dk, dv = (torch.where(lengths.seen.unsqueeze(-1), x, 0) for x in (dk, dv))
    return dq, dk, dv


def _packed(x: Tensor) -> Tensor:
    """(batch, heads, length, head_dim) -> (batch * length, heads, head_dim)."""
    return x.transpose(1, 2).flatten(0, 1)


def _unpacked(x: Tensor, batch: int) -> Tensor:
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
