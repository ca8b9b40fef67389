"""Llama 3, 3.1 and 3.2: a plain decoder in plain PyTorch (arXiv 2302.13971, 2407.21783).

It does not know that it will be cut. What a cut changes is inferred at run time: the number of heads from what the
projections return, the ends from whether they are there. Nothing here draws initial weights: `parallel.materialize`
does, from the plan.

Precision follows the dtype of the parameters (bfloat16, say), with three exceptions: rotary angles, cosines and sines
are computed in float32 and then rounded; RMSNorm takes its statistics in float32 (PyTorch's kernel does so for every
half type); attention on CPU is done in float32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quadriga.config.model_spec import ModelSpec, RopeScaling
from quadriga.models.kv_heads import repeat_kv, repeats_kv


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Radians a position turns each pair of entries by: float32 of shape (head_dim / 2,).

    RoPE (arXiv 2104.09864). With `scaling` the slow frequencies are divided by `factor`, the fast ones kept, those
    between blended in proportion to how often they turn within the original context (arXiv 2407.21783, section 3.4).
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
    """Cosines and signed sines, each (seq, 1, head_dim) in `dtype`; the 1 stands for the heads.

    The sines of the first half carry the minus of the rotation, so that `rotate` needs no negation.
    """
    angles = torch.outer(positions.to(torch.float32), frequencies)
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
        torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
    )


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn x of shape (batch, seq, heads, head_dim), entry i of the first half paired with entry i of the second.

    One roll and one fused multiply-add: fewer passes over memory than to negate and concatenate
    halves.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), signed_sin)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each position to those up to itself: (batch, heads, seq, head_dim) -> the same shape.

    k and v may have fewer heads, each shared by equally many query heads (GQA, arXiv 2305.13245).
    """
    dtype, grouped = q.dtype, q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and dtype.itemsize < 4:
        # The half-precision backward kernel on CPU is slower than the float32 one at small heads, and less exact.
        q, k, v = q.float(), k.float(), v.float()
    if repeats_kv(q.device.type, dtype.itemsize, q.shape[1], k.shape[1]):
        k, v = (repeat_kv(x, q.shape[1]) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).to(dtype)


class CausalAttention(nn.Module):
    """`causal_attention` as a module of no parameters, so that another can take its place."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_attention(q, k, v)


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        self.wq = nn.Linear(spec.dim, spec.n_heads * spec.head_dim, bias=False)
        self.wk = nn.Linear(spec.dim, spec.n_kv_heads * spec.head_dim, bias=False)
        self.wv = nn.Linear(spec.dim, spec.n_kv_heads * spec.head_dim, bias=False)
        self.wo = nn.Linear(spec.n_heads * spec.head_dim, spec.dim, bias=False)
        self.core = CausalAttention()

    def forward(self, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        heads = (-1, self.head_dim)  # as many as this rank's projections make
        q = rotate(self.wq(x).unflatten(-1, heads), cos, signed_sin)
        k = rotate(self.wk(x).unflatten(-1, heads), cos, signed_sin)
        v = self.wv(x).unflatten(-1, heads)
        attended = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.wo(attended.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

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

    def forward(self, x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, signed_sin)
        return x + self.feed_forward(self.ffn_norm(x))


class TiedOutput(nn.Module):
    """The output layer of a model whose logits are made by its embedding matrix: a module without parameters."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not a submodule: its matrix keeps one name

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Llama(nn.Module):
    """The whole model, or the part of it that is left when ends or layers are taken out (set to None, deleted by key).

    Without `tok_embeddings` the input is the hidden states of the part before; without `output` the output is hidden
    states.
    """

    rope_frequencies: Tensor

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        # From an empty tensor: the default normal draw on meta imports PyTorch's decompositions, which takes a second.
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
        """Compute the buffers anew where they lie: after `to_empty` they hold nothing, after a cast too few digits."""
        spec, device = self.spec, self.rope_frequencies.device
        self.rope_frequencies = rope_frequencies(spec.head_dim, spec.rope_theta, spec.rope_scaling, device)

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits (batch, seq, vocab) in the dtype of the parameters, of int64 `tokens` (batch, seq).

        `positions`, int64 (seq,), says where in the whole sequence the tokens stand; without it, at 0, 1, 2 ...
        """
        x = tokens if self.tok_embeddings is None else self.tok_embeddings(tokens)
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        # Made once a forward pass, not once a layer. No table is kept: it would need a longest sequence and saves
        # microseconds.
        cos, signed_sin = rope_tables(self.rope_frequencies.to(tokens.device), positions, x.dtype)
        for layer in self.layers.values():
            x = layer(x, cos, signed_sin)
        x = x if self.norm is None else self.norm(x)
        return x if self.output is None else self.output(x)
