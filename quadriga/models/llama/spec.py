"""The sizes of Llama 3, 3.1 and 3.2, and what follows from them by arithmetic. No torch here.

Dimensions are those of the published `config.json` files (Llama 3.1: arXiv 2407.21783, table 3; 1B and 3B: Llama 3.2).
"""

from __future__ import annotations

from types import MappingProxyType

from quadriga.config.model_spec import ROPE_SCALINGS, ModelSpec, RopeScaling

_LLAMA_VOCAB = 128_256  # 128,000 byte-pair tokens and 256 special ones
_LLAMA_3_1, _LLAMA_3_2 = ROPE_SCALINGS["llama3.1"], ROPE_SCALINGS["llama3.2"]


def _size(
    flavor: str,
    layers: int,
    dim: int,
    heads: int,
    kv_heads: int,
    ffn_dim: int,
    rope: RopeScaling | None,
    tied: bool = False,
) -> ModelSpec:
    return ModelSpec(
        name="llama3",
        flavor=flavor,
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        ffn_dim=ffn_dim,
        vocab_size=_LLAMA_VOCAB,
        rope_scaling=rope,
        tie_embeddings=tied,
    )


# The debug model is for fast tests of the whole code. It has the rotary scaling of Llama 3.1, so that it computes the
# same formulas as the large models. Its vocabulary fits any small tokenizer and is divisible by powers of 2.
_DEBUG = ModelSpec(
    name="llama3",
    flavor="debugmodel",
    dim=256,
    n_layers=6,
    n_heads=16,
    n_kv_heads=16,
    ffn_dim=768,
    vocab_size=2048,
    rope_scaling=_LLAMA_3_1,
)

SIZES: MappingProxyType[str, ModelSpec] = MappingProxyType(
    {
        spec.flavor: spec
        for spec in (
            _DEBUG,
            _size("1B", 16, 2048, 32, 8, 8192, _LLAMA_3_2, tied=True),
            _size("3B", 28, 3072, 24, 8, 8192, _LLAMA_3_2, tied=True),
            _size("8B", 32, 4096, 32, 8, 14336, _LLAMA_3_1),
            _size("70B", 80, 8192, 64, 8, 28672, _LLAMA_3_1),
            _size("405B", 126, 16384, 128, 8, 53248, _LLAMA_3_1),
        )
    }
)


def flops_per_pair(spec: ModelSpec) -> float:
    """Floating-point operations of attention, forward and backward, for one query and one key that it sees, over all
    layers."""
    return float(12 * spec.n_layers * spec.n_heads * spec.head_dim)


def flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Floating-point operations of forward and backward for one token of a sequence of `seq_len` tokens.

    6 per weight of a matrix product (2 forward, 4 backward). The input embedding is a lookup and does not count, unless
    it is tied and is also the output matrix. Attention adds 12 * layers * heads * head_dim (queries by keys, and
    attention weights by values) for each of seq_len / 2 keys, that a token sees on average. Recompute does not count.
    """
    looked_up = 0 if spec.tie_embeddings else spec.vocab_size * spec.dim
    weights = 6 * (spec.n_parameters - looked_up)
    return float(weights + flops_per_pair(spec) * seq_len / 2)
