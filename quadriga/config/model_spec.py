"""The dimensions and constants of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies for long contexts (arXiv 2407.21783, section 3.4)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


# By value of `model.rope_scaling`. `none` is Llama 3 before 3.1.
ROPE_SCALINGS: Mapping[str, RopeScaling | None] = {
    "none": None,
    "llama3.1": RopeScaling(factor=8.0),
    "llama3.2": RopeScaling(factor=32.0),
}


@dataclass(frozen=True)
class ModelSpec:
    """One size of a model family. `dim` is the width, `ffn_dim` the inner width of the feed-forward layers.

    Only the initial weights depend on `depth_init`.
    """

    name: str
    flavor: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    depth_init: bool = True

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads
