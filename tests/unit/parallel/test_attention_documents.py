"""Attention within documents, against attention with a mask, on one rank."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_attention_kernels import DEVICES, error

from quadriga.models.llama.model import CausalAttention, causal_attention, document_mask
from quadriga.parallel import attention_documents as documents
from quadriga.parallel.attention_allgather import chunk_attention
from quadriga.parallel.attention_documents import (
    NOTHING,
    DocumentAttention,
    Lengths,
    document_attention,
    visible_pieces,
)
from quadriga.parallel.sequence_cut import SequenceCut

SEQ = 32
ROWS = [
    [0, SEQ],
    [0, 1, 2, 3, 31, SEQ],  # documents of one token at the beginning and at the end
    [0, 8, 16, 24, SEQ],  # a border on each cut
    [0, 5, 30, SEQ],  # a document over all cuts
    list(range(SEQ + 1)),
]


def as_tensor(rows: list[list[int]]) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows], dtype=torch.int32)


BORDERS = as_tensor(ROWS)


def tensors(kv_heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """q, k, v and the gradient of the result."""
    generator = torch.Generator().manual_seed(3)
    heads = (4, kv_heads, kv_heads, 4)
    return [torch.randn(len(ROWS), n, SEQ, 8, generator=generator).to(dtype) for n in heads]


def with_gradients(attention: object, borders: torch.Tensor | None, given: list[torch.Tensor]) -> list[torch.Tensor]:
    *qkv, grad = given
    leaves = [x.clone().requires_grad_() for x in qkv]
    out = attention(*leaves, borders)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(grad)
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def test_the_mask_keeps_documents_apart() -> None:
    mask = document_mask(BORDERS, SEQ)
    for row, marks in enumerate(ROWS):
        of = [sum(mark <= place for mark in marks) for place in range(SEQ)]
        expected = [[of[q] == of[k] and k <= q for k in range(SEQ)] for q in range(SEQ)]
        assert mask[row].tolist() == expected


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_by_document_is_attention_with_a_mask(
    device: str, dtype: torch.dtype, tolerance: float, kv_heads: int
) -> None:
    """On CUDA this is the check of the kernel that takes all documents at once, and of its backward pass."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    given = [x.to(device, dtype) for x in tensors(kv_heads)]
    masked = with_gradients(causal_attention, BORDERS.to(device), given)
    ours = with_gradients(document_attention, BORDERS.to(device), given)
    for mine, theirs in zip(ours, masked, strict=True):
        assert error(mine, theirs) <= 2 * tolerance


def test_attention_by_document_is_attention_to_each_document_alone() -> None:
    *qkv, grad = tensors(2)
    ours = with_gradients(document_attention, BORDERS, [*qkv, grad])
    for row, marks in enumerate(ROWS):
        for first, after in pairwise(marks):
            alone = [x[row : row + 1, :, first:after] for x in (*qkv, grad)]
            for mine, theirs in zip(ours, with_gradients(causal_attention, None, alone), strict=True):
                assert torch.equal(mine[row : row + 1, :, first:after], theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_document_per_row_is_no_mask_to_the_bit(dtype: torch.dtype) -> None:
    borders = torch.tensor([[0, SEQ, SEQ]] * len(ROWS), dtype=torch.int32)
    plain = with_gradients(causal_attention, None, tensors(2, dtype))
    ours = with_gradients(DocumentAttention(CausalAttention()), borders, tensors(2, dtype))
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("chunks", [1, 2])
def test_a_part_of_a_sequence_sees_its_documents(
    device: str, dtype: torch.dtype, tolerance: float, chunks: int
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    q, k, v, grad = (x.to(device, dtype) for x in tensors(2))
    borders = BORDERS.to(device)
    whole = with_gradients(causal_attention, borders, [q, k, v, grad])
    sums = [torch.zeros_like(x) for x in (k, v)]
    for rank in range(4):
        cut = SequenceCut(rank, 4, chunks)
        here, starts = cut.positions(SEQ // 4).to(device), cut.starts(SEQ // 4)
        given = [q[:, :, here], k, v, grad[:, :, here]]
        ours = with_gradients(lambda *qkvb, at=starts: chunk_attention(*qkvb, at), borders, given)
        assert error(ours[0], whole[0][:, :, here]) <= 2 * tolerance
        assert error(ours[1], whole[1][:, :, here]) <= 2 * tolerance
        sums = [total + part for total, part in zip(sums, ours[2:], strict=True)]
    for total, expected in zip(sums, whole[2:], strict=True):
        assert error(total, expected) <= 2 * tolerance


@given(st.sets(st.integers(1, SEQ - 1)), st.sampled_from([1, 2, 4]), st.booleans())
def test_pieces_are_what_the_mask_shows(marks: set[int], degree: int, whole_keys: bool) -> None:
    """Every pair of a query and a key that the mask shows is in exactly one piece, for all chunks of both."""
    rows = [[0, *sorted(marks), SEQ, SEQ]]
    seen = torch.zeros(SEQ, SEQ, dtype=torch.int64)
    length = SEQ // degree
    for q_start in range(0, SEQ, length):
        ranges = [(0, q_start + length)] if whole_keys else [(at, length) for at in range(0, q_start + 1, length)]
        for k_start, k_length in ranges:
            for piece in visible_pieces(rows, q_start, length, k_start, k_length):
                queries = range(q_start + piece.queries.start, q_start + piece.queries.stop)
                keys = range(k_start + piece.keys.start, k_start + piece.keys.stop)
                shown = torch.ones(len(queries), len(keys), dtype=torch.int64)
                if piece.causal:
                    shown = shown.tril(len(keys) - len(queries))
                seen[queries.start : queries.stop, keys.start : keys.stop] += shown
    assert torch.equal(seen, document_mask(torch.tensor(rows), SEQ)[0].long())


def lengths_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Lengths, q_length: int, k_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What flash attention 2 does with rows end to end: the causal corner is at the end of each piece, and a query
    without keys gets garbage."""
    out, lse = torch.full_like(q, 7.0), torch.full((q.shape[1], q.shape[0]), torch.inf)
    for at, scores, values in each_piece(q, k, v, lengths, q_length, k_length):
        out[at] = (scores.softmax(-1) @ values).transpose(0, 1)
        lse[:, at] = scores.logsumexp(-1)
    return out, lse


def each_piece(q, k, v, lengths, q_length, k_length):
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    for (a, b), (c, d) in zip(pairwise(lengths.queries.tolist()), pairwise(lengths.keys.tolist()), strict=True):
        assert 0 <= b - a <= q_length
        assert 0 <= d - c <= k_length
        if a == b or c == d:
            continue
        scores = q[a:b].transpose(0, 1) @ k[c:d].permute(1, 2, 0) * q.shape[-1] ** -0.5
        if lengths.causal:
            assert d - c >= b - a
            scores = scores.masked_fill(~torch.ones(b - a, d - c).tril(d - c - (b - a)).bool(), -torch.inf)
        yield slice(a, b), scores, v[c:d].transpose(0, 1)
    assert lengths.queries[-1] == q.shape[0]
    assert lengths.keys[-1] <= k.shape[0]


def lengths_backward(grad, q, k, v, out, lse, lengths, q_length, k_length):
    """Gradients of the pieces alone, from the lse that is given, with garbage where nothing meets."""
    total = [torch.full_like(x, 7.0) for x in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    for (a, b), (c, d) in zip(pairwise(lengths.queries.tolist()), pairwise(lengths.keys.tolist()), strict=True):
        if a == b or c == d:
            continue
        mine, theirs = q[a:b].transpose(0, 1), k[c:d].repeat_interleave(groups, 1).transpose(0, 1)
        values, above = v[c:d].repeat_interleave(groups, 1).transpose(0, 1), grad[a:b].transpose(0, 1)
        scores = mine @ theirs.mT * q.shape[-1] ** -0.5
        if lengths.causal:
            scores = scores.masked_fill(~torch.ones(b - a, d - c).tril(d - c - (b - a)).bool(), -torch.inf)
        weights = (scores - lse[:, a:b].unsqueeze(-1)).exp()
        delta = (above * out[a:b].transpose(0, 1)).sum(-1, keepdim=True)
        slope = weights * (above @ values.mT - delta) * q.shape[-1] ** -0.5
        total[0][a:b] = (slope @ theirs).transpose(0, 1)
        for index, of_heads in ((1, slope.mT @ mine), (2, weights.mT @ above)):
            total[index][c:d] = of_heads.transpose(0, 1).unflatten(1, (-1, groups)).sum(2)
    return total


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(
    ("q_start", "q_length", "k_start", "k_length"),
    [(0, 32, 0, 32), (8, 8, 0, 16), (16, 16, 0, 32), (8, 8, 8, 8), (16, 8, 0, 8), (24, 8, 8, 16)],
)
def test_rows_end_to_end_give_what_pieces_give(
    q_start: int, q_length: int, k_start: int, k_length: int, kv_heads: int
) -> None:
    """The lengths for the kernel of CUDA, and what is done with queries and keys that do not meet."""
    q, k, v, grad = tensors(kv_heads)
    queries, keys = slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)
    q, grad, k, v = q[:, :, queries], grad[:, :, queries], k[:, :, keys], v[:, :, keys]
    place = BORDERS, q_start, k_start
    expected = documents.attend_documents(q, k, v, *place)
    lengths = Lengths.of(BORDERS, q, k, q_start, k_start)
    ours = documents.packed_forward(lengths_kernel, q, k, v, lengths)
    assert error(ours[0], expected[0]) <= 2e-6 or not expected[0].any()
    assert torch.equal(ours[1] == NOTHING, expected[1] == NOTHING)
    torch.testing.assert_close(ours[1], expected[1], rtol=2e-6, atol=2e-6)
    whole_out, whole_lse = torch.randn_like(q), expected[1].where(expected[1] != NOTHING, 0.5)
    given = grad, q, k, v, whole_out, whole_lse
    theirs = documents.attend_documents_backward(*given, *place)
    mine = documents.packed_backward(lengths_backward, *given, lengths)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("dynamic", [False, True])
def test_the_operations_keep_torchs_rules(dynamic: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, heads, 16, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    borders = torch.tensor([[0, 3, 16, 16]], dtype=torch.int32)
    check = "test_aot_dispatch_dynamic" if dynamic else "test_aot_dispatch_static"
    checks = ("test_schema", "test_autograd_registration", "test_faketensor", check)
    torch.library.opcheck(document_attention, (q, k, v, borders), test_utils=checks)
    torch.library.opcheck(chunk_attention, (q[:, :, :8], k, v, borders, [0, 12]), test_utils=checks)
