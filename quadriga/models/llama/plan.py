"""How a Llama may be cut and how its weights are born. No torch here."""

from __future__ import annotations

from collections.abc import Iterator

from quadriga.config.model_spec import ModelSpec
from quadriga.models.plan import ParallelPlan, ParameterPlan, ShardUnit, TensorCut

_STD = 0.02


def _depth_scaled(layer: int) -> float:
    """Of the two matrices that write to the residual stream: the deeper the layer, the less it says at first.

    Depth-scaled initialization (arXiv 1908.11365): the variance of the sum over the layers grows with the logarithm of
    their number instead of with the number.
    """
    return _STD / float(2 * (layer + 1)) ** 0.5


def _layer_parameters(spec: ModelSpec, layer: int) -> Iterator[ParameterPlan]:
    query, key_value = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    scaled, prefix = _depth_scaled(layer), f"layers.{layer}"
    yield ParameterPlan(f"{prefix}.attention.wq.weight", (query, spec.dim), std=_STD)
    yield ParameterPlan(f"{prefix}.attention.wk.weight", (key_value, spec.dim), std=_STD)
    yield ParameterPlan(f"{prefix}.attention.wv.weight", (key_value, spec.dim), std=_STD)
    yield ParameterPlan(f"{prefix}.attention.wo.weight", (spec.dim, query), std=scaled)
    yield ParameterPlan(f"{prefix}.feed_forward.w1.weight", (spec.ffn_dim, spec.dim), std=_STD)
    yield ParameterPlan(f"{prefix}.feed_forward.w2.weight", (spec.dim, spec.ffn_dim), std=scaled)
    yield ParameterPlan(f"{prefix}.feed_forward.w3.weight", (spec.ffn_dim, spec.dim), std=_STD)
    yield ParameterPlan(f"{prefix}.attention_norm.weight", (spec.dim,), init="ones")
    yield ParameterPlan(f"{prefix}.ffn_norm.weight", (spec.dim,), init="ones")


def _parameters(spec: ModelSpec) -> Iterator[ParameterPlan]:
    yield ParameterPlan("tok_embeddings.weight", (spec.vocab_size, spec.dim), std=_STD)
    for layer in range(spec.n_layers):
        yield from _layer_parameters(spec, layer)
    yield ParameterPlan("norm.weight", (spec.dim,), init="ones")
    if not spec.tie_embeddings:
        # The logits of a normed state of `dim` entries begin with a variance of 1, whatever the width.
        yield ParameterPlan("output.weight", (spec.vocab_size, spec.dim), std=spec.dim**-0.5)


def _shard_units(spec: ModelSpec) -> Iterator[ShardUnit]:
    """A tied matrix is used at both ends of the forward pass, so it lies in the root, which is gathered throughout."""
    if not spec.tie_embeddings:
        yield ShardUnit(("tok_embeddings",), weights_in_backward=False)
    for layer in range(spec.n_layers):
        yield ShardUnit((f"layers.{layer}",))
    if not spec.tie_embeddings:
        # The last unit of the forward pass is the first of the backward pass: to let it go in between gains nothing.
        yield ShardUnit(("norm", "output"), reshard=False)
    yield ShardUnit((), reshard=False)


def _tensor_cuts(layers: tuple[str, ...]) -> Iterator[TensorCut]:
    """Each pair of matrices is cut so that nothing is sent between its halves (arXiv 1909.08053).

    What lies between the pairs is cut along the sequence (arXiv 2205.05198).
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
        stage_units=("tok_embeddings", *layers, "norm", "output"),
        logits_unit="output",
    )
