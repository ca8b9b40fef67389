"""How a Llama can be sharded and how its weights are initialized. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator

from quadriga.config.model_spec import ModelSpec
from quadriga.models.plan import ParallelPlan, ParameterPlan, ShardUnit, TensorCut

_STD = 0.02
_BOUND = 2.0  # truncation for the matrices of a layer: at least 100 standard deviations, so without effect
_OUTPUT_STDS = 3.0  # truncation for the output layer, in standard deviations


def _scaled_std(spec: ModelSpec, layer: int) -> float:
    """The standard deviation of `wo`, `w2` and `w3`, which scale what a layer adds to the residual stream.

    `depth_init`: 0.02 / sqrt(2 (layer + 1)), depth-scaled initialization (arXiv 1908.11365): deeper layers initially
    add less. Otherwise 0.02 / sqrt(2 n_layers) in every layer, as in GPT-2.
    """
    return _STD / float(2 * (layer + 1 if spec.depth_init else spec.n_layers)) ** 0.5


def _layer_parameters(spec: ModelSpec, layer: int) -> Iterator[ParameterPlan]:
    query, key_value = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    scaled, prefix = _scaled_std(spec, layer), f"layers.{layer}"
    for name, shape, std in (
        ("attention.wq", (query, spec.dim), _STD),
        ("attention.wk", (key_value, spec.dim), _STD),
        ("attention.wv", (key_value, spec.dim), _STD),
        ("attention.wo", (spec.dim, query), scaled),
        ("feed_forward.w1", (spec.ffn_dim, spec.dim), _STD),
        ("feed_forward.w2", (spec.dim, spec.ffn_dim), scaled),
        ("feed_forward.w3", (spec.ffn_dim, spec.dim), scaled),
    ):
        yield ParameterPlan(f"{prefix}.{name}.weight", shape, std=std, bound=_BOUND)
    yield ParameterPlan(f"{prefix}.attention_norm.weight", (spec.dim,), init="ones")
    yield ParameterPlan(f"{prefix}.ffn_norm.weight", (spec.dim,), init="ones")


def _embeddings(spec: ModelSpec) -> ParameterPlan:
    """Standard deviation 1, not truncated. If tied to the output layer: 0.02, truncated like that layer.

    A tied matrix also computes the logits from normalized states. Their standard deviation is sqrt(dim) times that of
    the matrix: with 1 it would be 45 for the 1B model, and the first loss far above ln(vocab_size). 0.02 is the
    `initializer_range` of the published 1B and 3B models. (torchtitan v0.2.2 has no tied model.)
    """
    std, bound = (_STD, _OUTPUT_STDS * _STD) if spec.tie_embeddings else (1.0, math.inf)
    return ParameterPlan("tok_embeddings.weight", (spec.vocab_size, spec.dim), std=std, bound=bound)


def _parameters(spec: ModelSpec) -> Iterator[ParameterPlan]:
    """Yields all parameters, in order. Their initial values have the distributions of torchtitan v0.2.2."""
    yield _embeddings(spec)
    for layer in range(spec.n_layers):
        yield from _layer_parameters(spec, layer)
    yield ParameterPlan("norm.weight", (spec.dim,), init="ones")
    if not spec.tie_embeddings:
        # So the initial logits of a normalized state have variance 1 for every width.
        std = spec.dim**-0.5
        yield ParameterPlan("output.weight", (spec.vocab_size, spec.dim), std=std, bound=_OUTPUT_STDS * std)


def _shard_units(spec: ModelSpec) -> Iterator[ShardUnit]:
    """Yields the units of FSDP. A tied matrix is used at both ends of the forward pass, so it is in the root unit,
    which stays gathered."""
    if not spec.tie_embeddings:
        yield ShardUnit(("tok_embeddings",), weights_in_backward=False)
    for layer in range(spec.n_layers):
        yield ShardUnit((f"layers.{layer}",))
    if not spec.tie_embeddings:
        # The last unit of the forward pass is the first of the backward pass, so resharding in between saves nothing.
        yield ShardUnit(("norm", "output"), reshard=False)
    yield ShardUnit((), reshard=False)


def _tensor_cuts(layers: tuple[str, ...]) -> Iterator[TensorCut]:
    """Each pair of matrices is sharded so that there is no communication within the pair (arXiv 1909.08053).

    The activations between pairs are sharded along the sequence (arXiv 2205.05198).
    """
    yield TensorCut("tok_embeddings", "embedding")
    for layer in layers:
        yield TensorCut(f"{layer}.attention_norm", "norm")
        yield TensorCut(f"{layer}.attention", "gather")
        yield from (TensorCut(f"{layer}.attention.{name}", "columns") for name in ("wq", "wk", "wv"))
        yield TensorCut(f"{layer}.attention.wo", "rows")
        yield TensorCut(f"{layer}.ffn_norm", "norm")
        yield TensorCut(f"{layer}.feed_forward", "gather")
        yield from (TensorCut(f"{layer}.feed_forward.{name}", "columns") for name in ("w1", "w3"))
        yield TensorCut(f"{layer}.feed_forward.w2", "rows")
    yield TensorCut("norm", "norm")
    yield TensorCut("output", "logits")


def parallel_plan(spec: ModelSpec) -> ParallelPlan:
    layers = tuple(f"layers.{layer}" for layer in range(spec.n_layers))
    return ParallelPlan(
        parameters=tuple(_parameters(spec)),
        shard_units=tuple(_shard_units(spec)),
        recompute_units=layers,
        tensor_cuts=tuple(_tensor_cuts(layers)),
        attention_units=tuple(f"{layer}.attention.core" for layer in layers),
        stage_units=spec.stage_units,
        logits_unit="output",
    )
