"""Converts a `config.json` of Hugging Face to a `ModelSpec` and back, and reports values that are not supported.

Both formats are read: `rope_theta` and `rope_scaling` of transformers 4, `rope_parameters` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from quadriga import limits
from quadriga.config.model_spec import ROPE_SCALINGS, ModelSpec, RopeScaling
from quadriga.errors import Problem, UserError, shortened

_SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}
_OTHERS = {
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_ORIGINAL = "original_max_position_embeddings"
_ROPE = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
_MOST = {"num_hidden_layers": limits.MODEL_LAYERS}
_LIMITS = f"up to {limits.MODEL_LAYERS:,} layers, and {limits.MODEL_WIDTH:,} of everything else"
# Values that this model always has: (this value, the default of transformers for an absent field).
_FIXED: Mapping[str, tuple[Any, Any]] = {
    "hidden_act": ("silu", "silu"),
    "attention_bias": (False, False),
    "mlp_bias": (False, False),
    "quantization_config": (None, None),
}


def spec_from_hf(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The model that a `config.json` describes, as a flavor without a name. `where`: the file, for messages.

    Raises UserError with every value that Quadriga's Llama does not support.
    """
    problems = list(_problems(config, where))
    if problems:
        raise UserError(*problems)
    rope = _rope(config)
    heads = int(config["num_attention_heads"])
    return ModelSpec(
        name="llama3",
        flavor="",
        dim=int(config["hidden_size"]),
        n_layers=int(config["num_hidden_layers"]),
        n_heads=heads,
        n_kv_heads=int(_value_or(config, "num_key_value_heads", heads)),
        ffn_dim=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        rope_theta=float(_value_or(rope, "rope_theta", 10_000.0)),
        rope_scaling=_scaling(rope),
        norm_eps=float(_value_or(config, "rms_norm_eps", 1e-6)),
        tie_embeddings=bool(_value_or(config, "tie_word_embeddings", False)),
    )


def hf_config(spec: ModelSpec) -> dict[str, object]:
    """The fields of `config.json` that describe the model. The export adds token ids and dtype.

    `max_position_embeddings` is the published one: 131,072 with scaled rotary frequencies, the original length without.
    """
    scaling = spec.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.dim,
        "initializer_range": 0.02,
        "intermediate_size": spec.ffn_dim,
        "max_position_embeddings": 131_072 if scaling else 8_192,
        "mlp_bias": False,
        "num_attention_heads": spec.n_heads,
        "num_hidden_layers": spec.n_layers,
        "num_key_value_heads": spec.n_kv_heads,
        "rms_norm_eps": spec.norm_eps,
        "rope_scaling": None
        if scaling is None
        else {
            "factor": scaling.factor,
            "high_freq_factor": scaling.high_freq_factor,
            "low_freq_factor": scaling.low_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position,
            "rope_type": "llama3",
        },
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tie_embeddings,
        "vocab_size": spec.vocab_size,
    }


def config_differences(config: Mapping[str, Any], spec: ModelSpec, where: str) -> list[Problem]:
    """The differences between the model of a `config.json` and `spec`, including the rotary frequencies and the number
    of heads, which the shapes of tensors do not show. Raises UserError like `spec_from_hf`."""
    theirs = spec_from_hf(config, where)
    return [
        Problem(
            where,
            f"{(_SIZES | _OTHERS)[field.name]} is {getattr(theirs, field.name)}; "
            f"the model of this run has {getattr(spec, field.name)} ({_key(field.name)})",
            fix=_fix_for(field.name, getattr(theirs, field.name)),
        )
        for field in fields(ModelSpec)
        if field.name in _SIZES | _OTHERS and getattr(theirs, field.name) != getattr(spec, field.name)
    ]


def _key(field: str) -> str:
    return "model.flavor" if field == "norm_eps" else f"model.{field}"


def _fix_for(field: str, value: Any) -> str:
    """The remedy: the key to set so that the run has the value of the weights, if there is a key."""
    if field == "rope_scaling":
        name = next((name for name, scaling in ROPE_SCALINGS.items() if scaling == value), None)
        return f'set model.rope_scaling = "{name}"' if name else "no key has this scaling; choose other weights"
    if field == "norm_eps":
        return "no key changes it; choose other weights"
    return f"set {_key(field)} = {str(value).lower() if isinstance(value, bool) else value}"


def positions(config: Mapping[str, Any]) -> int:
    """The number of positions that the weights were trained for; 0 if the file has no valid number."""
    value = config.get("max_position_embeddings")
    return int(value) if value is not None and _is_count(value, limits.MODEL_WIDTH) else 0


def _problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    kind = config.get("model_type")
    if kind != "llama":
        what = "this is not a Llama, and no other family is supported"
        yield Problem(f"{where}, model_type", what, None if kind is None else shortened(kind), allowed="llama")
        return
    needed = [name for name in _SIZES.values() if name != "num_key_value_heads"]
    if absent := [name for name in needed if not _is_count(config.get(name), _MOST.get(name, limits.MODEL_WIDTH))]:
        yield Problem(where, f"these must be whole numbers of at least 1: {', '.join(absent)}", allowed=_LIMITS)
        return
    for name, (built, default) in _FIXED.items():
        if (value := config.get(name, default)) != built:
            what = "quantized weights are not supported" if name == "quantization_config" else "not supported"
            yield Problem(f"{where}, {name}", what, shortened(value), allowed=str(built))
    if not isinstance(tied := _value_or(config, "tie_word_embeddings", False), bool):
        yield Problem(f"{where}, tie_word_embeddings", "must be true or false", shortened(tied))
    if not _is_positive(_value_or(config, "rms_norm_eps", 1e-6)):
        yield Problem(f"{where}, rms_norm_eps", "must be a number above 0", shortened(config["rms_norm_eps"]))
    dim, heads = config["hidden_size"], config["num_attention_heads"]
    key_value = _value_or(config, "num_key_value_heads", heads)
    if dim % heads or _value_or(config, "head_dim", dim // heads) != dim // heads:
        what = f"a head width other than hidden_size / num_attention_heads = {dim} / {heads} is not supported"
        yield Problem(f"{where}, head_dim", what, shortened(config.get("head_dim")))
    elif dim // heads % 2:
        yield Problem(f"{where}, head_dim", "rotary embeddings need an even head width", str(dim // heads))
    if not _is_count(key_value, heads) or heads % key_value:
        yield Problem(f"{where}, num_key_value_heads", f"it does not divide {heads} heads", shortened(key_value))
    yield from _rope_problems(config, where)


def _rope_problems(config: Mapping[str, Any], where: str) -> Iterator[Problem]:
    for spelling in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(spelling) or {}, dict):
            yield Problem(f"{where}, {spelling}", "must be an object or null", shortened(config[spelling]))
            return
    rope = _rope(config)
    kind = _rope_type(rope)
    if kinds := [name for name, value in rope.items() if isinstance(value, dict)]:
        what = "several kinds of rotary frequencies in one model are not supported"
        yield Problem(f"{where}, rope_parameters", what, shortened(", ".join(kinds)))
    elif kind not in ("default", "llama3"):
        what = "this scaling of rotary frequencies is not supported"
        yield Problem(f"{where}, rope_type", what, shortened(kind), allowed="llama3, default")
    elif kind == "llama3" and (absent := [name for name in _ROPE if rope.get(name) is None]):
        yield Problem(where, f"the scaling of the rotary frequencies lacks {', '.join(absent)}")
    elif kind == "llama3" and (wrong := [name for name in _ROPE if not _is_positive(rope[name])]):
        what = "the scaling of the rotary frequencies needs numbers above 0"
        yield Problem(f"{where}, {', '.join(wrong)}", what, shortened([rope[name] for name in wrong]))
    elif kind == "llama3" and rope["high_freq_factor"] <= rope["low_freq_factor"]:
        yield Problem(
            f"{where}, high_freq_factor", "must be above low_freq_factor", shortened(rope["high_freq_factor"])
        )
    elif kind == "llama3" and rope[_ORIGINAL] % 1:
        yield Problem(f"{where}, {_ORIGINAL}", "must be a whole number", shortened(rope[_ORIGINAL]))
    if not _is_positive(_value_or(rope, "rope_theta", 10_000.0)):
        yield Problem(f"{where}, rope_theta", "must be a number above 0", shortened(rope["rope_theta"]))
    if _value_or(rope, "partial_rotary_factor", 1.0) != 1.0:
        yield Problem(f"{where}, partial_rotary_factor", "not supported", shortened(rope["partial_rotary_factor"]))


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values of the rotary frequencies, from both formats. As in transformers 5.24, `rope_scaling` replaces
    `rope_parameters`, and `original_max_position_embeddings` outside them is not used."""
    said = {name: config[name] for name in ("rope_theta", "partial_rotary_factor") if name in config}
    return said | (config.get("rope_scaling") or config.get("rope_parameters") or {})


def _rope_type(rope: Mapping[str, Any]) -> str:
    return str(_value_or(rope, "rope_type", _value_or(rope, "type", "default")))


def _scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    if _rope_type(rope) == "default":
        return None
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope[_ORIGINAL]),
    )


def _value_or(table: Mapping[str, Any], name: str, default: Any) -> Any:
    """The value of an entry; `default` if it is absent or null."""
    value = table.get(name)
    return default if value is None else value


def _is_positive(value: object) -> bool:
    """Whether it is a finite number above 0 within the range of float64."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300


def _is_count(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most
