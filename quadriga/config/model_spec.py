"""The dimensions and constants of a model, and what follows from them for a decoder like Llama 3.

Both the rules of the configuration and `models` use it, which may not import each other's code.
"""

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

    @property
    def n_parameters(self) -> int:
        """The number of trained parameters: attention, feed-forward, norms, embedding and output. Tied embeddings count
        once."""
        attention = 2 * self.dim * self.head_dim * (self.n_heads + self.n_kv_heads)
        layer = attention + 3 * self.dim * self.ffn_dim + 2 * self.dim
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return self.n_layers * layer + embeddings + self.dim

    @property
    def stage_units(self) -> tuple[str, ...]:
        """The modules between which a pipeline may split, in the order of the forward pass."""
        return ("tok_embeddings", *(f"layers.{layer}" for layer in range(self.n_layers)), "norm", "output")
