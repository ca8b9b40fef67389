"""Llama 3, 3.1 and 3.2: a decoder-only transformer in plain PyTorch (arXiv 2302.13971, 2407.21783).

The model does not depend on how it is sharded. The effects of sharding are inferred at run time: the number of heads
from the output of the projections, the ends of a pipeline stage from the modules that exist. The initial weights are
not drawn here, but by `parallel.materialize` from the plan.

Precision follows the dtype of the parameters (for example bfloat16), with three exceptions. Rotary angles, cosines and
sines are computed in float32 and then rounded. RMSNorm computes its statistics in float32, as PyTorch's kernel does for
every half-precision dtype. Attention on a CPU is computed in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadriga.config.model_spec import ModelSpec, RopeScaling
from quadriga.models.kv_heads import repeat_kv, repeats_kv


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """The rotation of each pair of entries in radians per position: float32, shape (head_dim / 2,).

    RoPE (arXiv 2104.09864). With `scaling`, slow frequencies are divided by `factor` and fast ones are kept. Those
    between are blended in proportion to their number of turns within the original context (arXiv 2407.21783, section
    3.4).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rope_tables(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each (seq, 1, head_dim) in `dtype`, or (batch, seq, 1, head_dim) if rows have their own
    positions; the 1 broadcasts over the heads.

    `frequencies`: float32, (head_dim / 2,); `positions`: (seq,) or (batch, seq). The sines of the first half are
    negated, so that `rotate` needs no negation.
    """
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(-2),
        torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(-2),
    )


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotates x, (batch, seq, heads, head_dim); entry i of the first half is paired with entry i of the second half.

    One roll and one fused multiply-add take fewer passes over memory than to negate and concatenate the halves.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None) -> Tensor:
    """Attention of each position to itself and earlier ones: (batch, heads, seq, head_dim) -> the same shape and dtype.

    k and v can have fewer heads, each shared by the same number of query heads (GQA, arXiv 2305.13245). With `borders`
    (`Llama.forward`), no document sees another one, by a mask of seq x seq; `parallel.attention_documents` computes the
    same without that mask.
    """
    dtype, grouped = q.dtype, q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and dtype.itemsize < 4:
        # On a CPU, the half-precision backward kernel is slower than the float32 one for small heads, and less exact.
        q, k, v = q.float(), k.float(), v.float()
    if repeats_kv(q.device.type, dtype.itemsize, q.shape[1], k.shape[1]):
        k, v = (repeat_kv(x, q.shape[1]) for x in (k, v))
        grouped = False
    mask = None if borders is None else document_mask(borders, q.shape[2]).unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped).to(dtype)


def document_mask(borders: Tensor, seq_len: int) -> Tensor:
    """Which key a query sees: bool, (batch, seq, seq). `borders`: see `Llama.forward`."""
    places = torch.arange(seq_len, device=borders.device)
    document = (borders.unsqueeze(1) <= places.unsqueeze(1)).sum(-1)  # (batch, seq)
    same = document.unsqueeze(2) == document.unsqueeze(1)
    return same & (places.unsqueeze(1) >= places)


class CausalAttention(nn.Module):
    """`causal_attention` as a module without parameters, so that context parallelism can replace it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, borders: Tensor | None = None) -> Tensor:
        return causal_attention(q, k, v, borders)


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.wq = nn.Linear(spec.dim, spec.n_heads * spec.head_dim, bias=False)
        self.wk = nn.Linear(spec.dim, spec.n_kv_heads * spec.head_dim, bias=False)
        self.wv = nn.Linear(spec.dim, spec.n_kv_heads * spec.head_dim, bias=False)
        self.wo = nn.Linear(spec.n_heads * spec.head_dim, spec.dim, bias=False)
        self.core = CausalAttention()

    def forward(self, x: Tensor, cos: Tensor, signed_sin: Tensor, borders: Tensor | None = None) -> Tensor:
        heads = (-1, self.head_dim)  # as many heads as this rank's projections return
        q = rotate(self.wq(x).unflatten(-1, heads), cos, signed_sin)
        k = rotate(self.wk(x).unflatten(-1, heads), cos, signed_sin)
        v = self.wv(x).unflatten(-1, heads)
        attended = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), borders)
        return self.wo(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.w1 = nn.Linear(spec.dim, spec.ffn_dim, bias=False)
        self.w2 = nn.Linear(spec.ffn_dim, spec.dim, bias=False)
        self.w3 = nn.Linear(spec.dim, spec.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.attention = Attention(spec)
        self.feed_forward = FeedForward(spec)
        self.attention_norm = nn.RMSNorm(spec.dim, eps=spec.norm_eps)
        self.ffn_norm = nn.RMSNorm(spec.dim, eps=spec.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, signed_sin: Tensor, borders: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, signed_sin, borders)
        return x + self.feed_forward(self.ffn_norm(x))


class TiedOutput(nn.Module):
    """The output layer of a model with tied embeddings: a module without parameters that uses the embedding matrix."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not a submodule and its matrix has one name

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Llama(nn.Module):
    """The whole model, or a part of it: a pipeline stage sets its absent ends to None, and deletes layers by key.

    Without `tok_embeddings`, the input is the hidden states of the stage before, (batch, seq, dim). Without `output`,
    the output is hidden states.
    """

    rope_frequencies: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        # From an empty tensor: the default draw on the meta device imports PyTorch's decompositions, which takes 1 s.
        empty = torch.empty(spec.vocab_size, spec.dim)
        self.tok_embeddings: nn.Embedding | None = nn.Embedding.from_pretrained(empty, freeze=False)
        self.layers = nn.ModuleDict({str(layer): Block(spec) for layer in range(spec.n_layers)})
        self.norm: nn.RMSNorm | None = nn.RMSNorm(spec.dim, eps=spec.norm_eps)
        self.output: nn.Linear | TiedOutput | None = (
            TiedOutput(self.tok_embeddings) if spec.tie_embeddings else nn.Linear(spec.dim, spec.vocab_size, bias=False)
        )
        self.register_buffer("rope_frequencies", torch.empty(spec.head_dim // 2), persistent=False)
        if not self.rope_frequencies.is_meta:
            self.reset_buffers()

    def reset_buffers(self) -> None:
        """Recomputes the buffers on their device: after `to_empty` they are undefined, after a cast not exact."""
        spec, device = self.spec, self.rope_frequencies.device
        self.rope_frequencies = rope_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling, device)

    def forward(self, tokens: Tensor, positions: Tensor | None = None, borders: Tensor | None = None) -> Tensor:
        """Logits (batch, seq, vocab) in the dtype of the parameters, of int64 `tokens` (batch, seq).

        Args:
            positions: int64, (seq,), the positions of the tokens in the whole sequence; (batch, seq) if rows differ, as
                positions in documents do; None: 0, 1, 2 ...
            borders: int32, (batch, n), the documents of each row, which do not see each other: the first position of
                each in the whole sequence, beginning with 0, then the length of the sequence, repeated. None: a row is
                one document.
        """
        x = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        # Computed once per forward pass, not per layer. It is not cached: a cache would need a maximum length, and
        # would save microseconds.
        cos, signed_sin = rope_tables(self.rope_frequencies.to(tokens.device), positions, x.dtype)
        for layer in self.layers.values():
            x = layer(x, cos, signed_sin, borders)
        x = x if self.norm is None else self.norm(x)
        return x if self.output is None else self.output(x)
