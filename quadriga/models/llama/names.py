"""The tensors of Llama in checkpoints of Hugging Face and of torchtitan.

Rotary embeddings rotate pairs of entries of a head. Quadriga, like transformers, pairs entry i of the first half with
entry i of the second half. So Hugging Face's tensors differ only in their names. torchtitan, like Meta's code, pairs
neighbors (2i, 2i + 1). Its tensors have the same names, but the rows of `wq` and `wk` have another order.
"""

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
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
_PAIRED = re.compile(r"layers\.\d+\.attention\.w[qk]\.weight")


@dataclass(frozen=True)
class LlamaTensorNames:
    """The tensors of one model, and what other programs call them."""

    spec: ModelSpec

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of every tensor, by Quadriga's names. It is the same in all programs."""
        return {parameter.name: parameter.shape for parameter in parallel_plan(self.spec).parameters}

    def hf_name(self, name: str) -> str:
        """`layers.0.attention.wq.weight` -> `model.layers.0.self_attn.q_proj.weight`. Unknown: raises ValueError."""
        if name in _ENDS:
            return _ENDS[name]
        match = _LAYER.fullmatch(name)
        if match and match[2] in _IN_LAYER:
            return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.weight"
        raise ValueError(f"'{name}' is not a parameter of Quadriga's Llama, so it has no Hugging Face name")

    def is_optional(self, name: str) -> bool:
        """Whether a Hugging Face file can have this tensor although it is not loaded: the rotary frequencies in older
        files, which Quadriga computes."""
        return name.endswith(".rotary_emb.inv_freq")

    def config_differences(self, config: Mapping[str, Any], where: str) -> list[Problem]:
        return config_differences(config, self.spec, where)

    def paired_rows(self, name: str) -> int:
        """Rows per head, if torchtitan rotates the rows of this tensor in pairs; otherwise 0."""
        return self.spec.head_dim if _PAIRED.fullmatch(name) else 0
