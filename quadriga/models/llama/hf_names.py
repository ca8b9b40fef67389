"""Hugging Face's names of the tensors. Only names differ: rows have the same order, because both rotate halves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quadriga.config.model_spec import ModelSpec
from quadriga.errors import Problem
from quadriga.models.llama.hf_config import config_differences
from quadriga.models.llama.plan import parallel_plan

_ENDS = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_ENDS_BACK = {theirs: ours for ours, theirs in _ENDS.items()}
_IN_LAYER_BACK = {theirs: ours for ours, theirs in _IN_LAYER.items()}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
_LAYER_BACK = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


def to_hf(name: str) -> str:
    """`layers.0.attention.wq.weight` -> `model.layers.0.self_attn.q_proj.weight`. Unknown names raise ValueError."""
    if name in _ENDS:
        return _ENDS[name]
    match = _LAYER.fullmatch(name)
    if match and match[2] in _IN_LAYER:
        return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight"
    raise ValueError(f"'{name}' is not a parameter of Quadriga's Llama, so it has no Hugging Face name")


def from_hf(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> `layers.0.attention.wq.weight`. Unknown names raise ValueError."""
    if name in _ENDS_BACK:
        return _ENDS_BACK[name]
    match = _LAYER_BACK.fullmatch(name)
    if match and match[2] in _IN_LAYER_BACK:
        return f"layers.{match[1]}.{_IN_LAYER_BACK[match[2]]}.weight"
    raise ValueError(f"'{name}' is not a tensor of a Hugging Face Llama that this model has")


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


@dataclass(frozen=True)
class HfNames:
    """Maps the tensors of one model to Hugging Face's names; the shapes are the same."""

    spec: ModelSpec

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by Quadriga's names."""
        return {parameter.name: parameter.shape for parameter in parallel_plan(self.spec).parameters}

    def hf_name(self, name: str) -> str:
        return to_hf(name)

    def is_optional(self, name: str) -> bool:
        """Whether a Hugging Face file can have this tensor although it is not loaded: the rotary frequencies in older
        files, which Quadriga computes."""
        return name.endswith(".rotary_emb.inv_freq")

    def config_differences(self, config: Mapping[str, Any], where: str) -> list[Problem]:
        return config_differences(config, self.spec, where)
