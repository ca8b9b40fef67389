"""Shared key and value heads against loops: the arithmetic that only CUDA's branches use, reached on CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from quadriga.models.kv_heads import repeat_kv, repeats_kv, sum_kv
from quadriga.models.llama import model
from quadriga.parallel.attention_kernels import LSE_ALIGNMENT, efficient_backward, efficient_forward

HEADS = [(4, 4), (4, 2), (4, 1), (6, 2), (6, 3)]


def random(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_by_loops(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """(out, lse), one query and one head at a time; head h reads head h * kv_heads // heads."""
    outs, statistics = [], []
    for batch in range(q.shape[0]):
        for head in range(q.shape[1]):
            shared = head * k.shape[1] // q.shape[1]
            for at in range(q.shape[2]):
                seen = at + 1 if causal else k.shape[2]
                scores = k[batch, shared, :seen] @ q[batch, head, at] / math.sqrt(q.shape[3])
                outs.append(scores.softmax(0) @ v[batch, shared, :seen])
                statistics.append(scores.logsumexp(0))
    return torch.stack(outs).view(q.shape), torch.stack(statistics).view(q.shape[:3])


def kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """What the memory-efficient kernel of CUDA does: no shared heads; the lse filled up with infinity."""
    assert q.shape[1] == k.shape[1] == v.shape[1]
    out, lse = attention_by_loops(q, k, v, causal)
    return out, torch.nn.functional.pad(lse, (0, -lse.shape[2] % LSE_ALIGNMENT), value=torch.inf)


def backward_kernel(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool
) -> tuple[Tensor, ...]:
    """Gradients from the statistics, as such a kernel makes them."""
    assert q.shape[1] == k.shape[1] == v.shape[1]
    assert lse.shape[2] % LSE_ALIGNMENT == 0
    assert torch.isinf(lse[:, :, q.shape[2] :]).all()
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -torch.inf)
    p = (scores - lse[:, :, : q.shape[2], None]).exp()
    ds = p * (grad @ v.transpose(2, 3) - (grad * out).sum(-1, keepdim=True)) / math.sqrt(q.shape[3])
    return ds @ k, ds.transpose(2, 3) @ q, p.transpose(2, 3) @ grad


@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
def test_each_query_head_reads_its_own_shared_head(heads, kv_heads):
    x = random(2, kv_heads, 3, 5)
    repeated = repeat_kv(x, heads)
    assert repeated.shape == (2, heads, 3, 5)
    for head in range(heads):
        assert torch.equal(repeated[:, head], x[:, head * kv_heads // heads]), head
    grad = random(2, heads, 3, 5)
    expected = torch.zeros_like(x)
    for head in range(heads):
        expected[:, head * kv_heads // heads] += grad[:, head]
    assert torch.allclose(sum_kv(grad, kv_heads), expected, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq", [5, LSE_ALIGNMENT])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS[:4])
def test_float32_on_cuda_around_its_kernel(heads, kv_heads, seq, causal):
    q, k, v = (random(1, n, seq, 4, seed=n + i).requires_grad_() for i, n in enumerate((heads, kv_heads, kv_heads)))
    expected, expected_lse = attention_by_loops(q, k, v, causal)
    grad = random(1, heads, seq, 4, seed=9)
    expected.backward(grad)
    with torch.no_grad():
        out, lse = efficient_forward(kernel, q, k, v, causal)
        assert lse.shape == expected_lse.shape
        assert torch.allclose(out, expected)
        assert torch.allclose(lse, expected_lse)
        gradients = efficient_backward(backward_kernel, grad, q, k, v, out, lse, causal)
    for ours, theirs in zip(gradients, (q, k, v), strict=True):
        assert torch.allclose(ours, theirs.grad)


@pytest.mark.parametrize("repeats", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS[:4])
def test_the_models_attention_with_shared_and_with_repeated_heads(heads, kv_heads, repeats, monkeypatch):
    """`repeats` takes the branch of float32 on CUDA."""
    monkeypatch.setattr(model, "repeats_kv", lambda device_type, itemsize, heads, kv_heads: repeats)
    q, k, v = (random(2, n, 7, 4, seed=n + i).requires_grad_() for i, n in enumerate((heads, kv_heads, kv_heads)))
    grad = random(2, heads, 7, 4, seed=9)
    expected, _ = attention_by_loops(q, k, v, causal=True)
    wanted = torch.autograd.grad(expected, (q, k, v), grad)
    out = model.causal_attention(q, k, v)
    assert torch.allclose(out, expected)
    for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), grad), wanted, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (("cuda", 4, 8, 2), True),
        (("cuda", 4, 8, 8), False),
        (("cuda", 2, 8, 2), False),
        (("cpu", 4, 8, 2), False),
        (("cpu", 2, 8, 2), False),
    ],
)
def test_heads_are_repeated_for_float32_on_cuda_alone(case, expected):
    assert repeats_kv(*case) is expected
