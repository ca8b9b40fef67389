"""The two model shapes of the speed benchmarks, and the constants of the optimizer. No slow imports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama and its batch. `batch`: rows of the global batch, each of `seq_len` tokens."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    seq_len: int
    batch: int

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


SHAPES = {
    "debug": Shape(2048, dim=256, n_layers=6, n_heads=16, n_kv_heads=16, ffn_dim=768, seq_len=512, batch=8),
    "small": Shape(32000, dim=512, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=1536, seq_len=512, batch=4),
}
DTYPES = ("float32", "bfloat16")

LR, BETAS, EPS, WEIGHT_DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
ROPE_THETA, NORM_EPS = 500_000.0, 1e-5
