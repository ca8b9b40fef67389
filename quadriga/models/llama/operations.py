"""The operations of a Llama, as in `model.py`. No torch here.

A test compares this with the model: the bytes that a forward pass saves for the backward pass, on many layouts.
"""

from __future__ import annotations

from quadriga.config.model_spec import ModelSpec
from quadriga.models.operations import Cut, Kernels, Trace, Tracer, Value


def block_trace(spec: ModelSpec, cut: Cut, kernels: Kernels) -> Trace:
    """The operations of one block, without the rotary tables, which all blocks share."""
    hidden, query, key = Value(spec.dim, "hidden"), spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    tracer = Tracer({"x": hidden})
    taken = _gathered(tracer, _normed(tracer, "x", "attention_norm", spec.dim, kernels), spec.dim, cut)
    q0 = _product(tracer, taken, "attention.wq", (spec.dim, query))
    k0 = _product(tracer, taken, "attention.wk", (spec.dim, key))
    v = _product(tracer, taken, "attention.wv", (spec.dim, key))
    q = tracer.add("q", Value(query), "cheap", (q0,))  # rotated; the backward pass needs only the rotary tables
    k = tracer.add("k", Value(key), "cheap", (k0,))
    out = _attention(tracer, q, k, v, spec, cut, kernels)
    o = _product(tracer, out, "attention.wo", (query, spec.dim), spread="whole")
    x1 = tracer.add("x1", hidden, "add", ("x", _scattered(tracer, o, spec.dim, cut)))
    taken = _gathered(tracer, _normed(tracer, x1, "ffn_norm", spec.dim, kernels), spec.dim, cut)
    w1 = _product(tracer, taken, "feed_forward.w1", (spec.dim, spec.ffn_dim))
    silu = tracer.add("silu", Value(spec.ffn_dim), "cheap", (w1,), saved=(w1,))
    w3 = _product(tracer, taken, "feed_forward.w3", (spec.dim, spec.ffn_dim))
    inner = tracer.add("inner", Value(spec.ffn_dim), "cheap", (silu, w3), saved=(silu, w3))
    w2 = _product(tracer, inner, "feed_forward.w2", (spec.ffn_dim, spec.dim), spread="whole")
    return tracer.trace(tracer.add("y", hidden, "add", (x1, _scattered(tracer, w2, spec.dim, cut))))


def head_trace(spec: ModelSpec, cut: Cut, kernels: Kernels) -> Trace:
    """The operations of the last norm and the logits."""
    tracer = Tracer({"x": Value(spec.dim, "hidden")})
    taken = _gathered(tracer, _normed(tracer, "x", "norm", spec.dim, kernels), spec.dim, cut)
    return tracer.trace(_product(tracer, taken, "output", (spec.dim, spec.vocab_size)))


def _normed(tracer: Tracer, x: str, name: str, dim: int, kernels: Kernels) -> str:
    """RMSNorm. Without CUDA, it is several operations in float32 that save the input and the unscaled result."""
    extra = {f"{name}.rstd": Value(1, "hidden", float32=True)}
    saved: tuple[str, ...] = (x, f"{name}.rstd")
    if not kernels.fused_norm:
        extra[f"{name}.unscaled"] = Value(dim, "hidden", float32=True)
        saved = (*saved, f"{name}.unscaled")
        if kernels.half:
            extra[f"{name}.wide"] = Value(dim, "hidden", float32=True)
            saved = (f"{name}.wide", *saved[1:])
    return tracer.add(f"{name}.out", Value(dim, "hidden"), "norm", (x,), saved, extra, module=name)


def _gathered(tracer: Tracer, x: str, dim: int, cut: Cut) -> str:
    return tracer.add(f"{x}.whole", Value(dim, "whole"), "gather", (x,)) if cut.sequence else x


def _scattered(tracer: Tracer, x: str, dim: int, cut: Cut) -> str:
    if cut.sequence:
        return tracer.add(f"{x}.part", Value(dim, "hidden"), "scatter", (x,))
    return tracer.add(f"{x}.sum", Value(dim, "hidden"), "reduce", (x,)) if cut.tensor else x


def _product(tracer: Tracer, x: str, module: str, matrix: tuple[int, int], spread: str = "features") -> str:
    return tracer.add(f"{module}.out", Value(matrix[1], spread), "product", (x,), (x,), matrix=matrix, module=module)


def _attention(tracer: Tracer, q: str, k: str, v: str, spec: ModelSpec, cut: Cut, kernels: Kernels) -> str:
    """Attention within a rank, or over all context-parallel ranks by one of the methods. Returns the input of `wo`."""
    query, key = spec.n_heads * spec.head_dim, spec.n_kv_heads * spec.head_dim
    lse = {"lse": Value(spec.n_heads, float32=True)}
    if cut.context == "allgather":
        keys = tracer.add("keys", Value(2 * key, "sequence"), "gather_keys", (k, v))
        return tracer.add("out", Value(query), "attention", (q, keys), (q, keys, "out", "lse"), lse)
    if cut.context == "ring":
        return tracer.add("out", Value(query), "attention", (q, k, v), (q, k, v, "out", "lse"), lse)
    if cut.context == "ulysses":
        q = tracer.add("q.heads", Value(query), "exchange", (q,))
        k = tracer.add("k.heads", Value(key), "exchange", (k,))
        v = tracer.add("v.heads", Value(key), "exchange", (v,))
        out = _own_attention(tracer, q, k, v, query, key, lse, kernels)
        return tracer.add("out.tokens", Value(query), "exchange", (out,))
    return _own_attention(tracer, q, k, v, query, key, lse, kernels)


def _own_attention(
    tracer: Tracer, q: str, k: str, v: str, query: int, key: int, lse: dict[str, Value], kernels: Kernels
) -> str:
    wide = kernels.attention == "cpu" and kernels.half
    if wide:
        q, k, v = (
            tracer.add(f"{name}.wide", Value(width, float32=True), "cheap", (name,))
            for name, width in ((q, query), (k, key), (v, key))
        )
    if kernels.attention == "efficient" and query != key:
        k = tracer.add(f"{k}.repeated", Value(query), "cheap", (k,))
        v = tracer.add(f"{v}.repeated", Value(query), "cheap", (v,))
    out = tracer.add("out", Value(query, float32=wide), "attention", (q, k, v), (q, k, v, "out", "lse"), lse)
    return tracer.add("out.narrow", Value(query), "cheap", (out,)) if wide else out
