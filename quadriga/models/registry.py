"""The model families. Importing this does not import torch: the code of a family is imported when it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quadriga.config.model_spec import ModelSpec
from quadriga.models.llama import hf_config as llama_hf_config
from quadriga.models.llama import names as llama_names
from quadriga.models.llama import operations as llama_operations
from quadriga.models.llama import plan as llama_plan
from quadriga.models.llama import spec as llama_spec
from quadriga.models.operations import Cut, Kernels, Trace
from quadriga.models.plan import ParallelPlan

if TYPE_CHECKING:
    from torch import nn


def catalogue() -> Mapping[str, Mapping[str, ModelSpec]]:
    """The specification of every model, by `model.name` and `model.flavor`."""
    return {"llama3": llama_spec.SIZES}


def build_model(spec: ModelSpec) -> nn.Module:
    """The model on the current default device; under `torch.device("meta")` it allocates no memory."""
    _known(spec)
    from quadriga.models.llama.model import Llama

    return Llama(spec)


def parallel_plan(spec: ModelSpec) -> ParallelPlan:
    """How the model can be sharded, and how each of its parameters is initialized."""
    _known(spec)
    return llama_plan.parallel_plan(spec)


def block_trace(spec: ModelSpec, cut: Cut, kernels: Kernels) -> Trace:
    """The operations of one block."""
    _known(spec)
    return llama_operations.block_trace(spec, cut, kernels)


def head_trace(spec: ModelSpec, cut: Cut, kernels: Kernels) -> Trace:
    """The operations after the last block: a norm and the logits."""
    _known(spec)
    return llama_operations.head_trace(spec, cut, kernels)


def flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """FLOPs per token of forward and backward: causal attention counts half, an untied input embedding and recompute
    do not count."""
    _known(spec)
    return llama_spec.flops_per_token(spec, seq_len)


def flops_per_pair(spec: ModelSpec) -> float:
    """FLOPs of attention, forward and backward, for one query and one key that it sees."""
    _known(spec)
    return llama_spec.flops_per_pair(spec)


def tensor_names(spec: ModelSpec) -> llama_names.LlamaTensorNames:
    """The names and shapes of the model's tensors in checkpoints of Hugging Face and torchtitan."""
    _known(spec)
    return llama_names.LlamaTensorNames(spec)


def hf_config(spec: ModelSpec, *, bos_id: int | None, eos_id: int | None, positions: int = 0) -> dict[str, Any]:
    """The fields of a Hugging Face `config.json`, except the dtype. Unknown token ids are null, because an absent field
    means token 1 or 2. `positions`: the longest sequence that the weights were trained for; 0 (unknown) uses the
    published number of this kind of model."""
    _known(spec)
    config: dict[str, Any] = llama_hf_config.hf_config(spec)
    longest = positions or config["max_position_embeddings"]
    return {**config, "max_position_embeddings": longest, "bos_token_id": bos_id, "eos_token_id": eos_id}


def positions_from_hf(config: Mapping[str, Any]) -> int:
    """The number of positions that the weights of a `config.json` were trained for; 0 if it does not state it."""
    return llama_hf_config.positions(config)


def spec_from_hf(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The model that a `config.json` describes. A flavor of Quadriga has its name, any other is called `hf`.

    Raises UserError for a model that is not supported; `where` is the file in the message."""
    spec = llama_hf_config.spec_from_hf(config, where)
    flavors = catalogue()[spec.name]
    known = (flavor for flavor, size in flavors.items() if replace(size, flavor="") == spec)
    return replace(spec, flavor=next(known, "hf"))


def _known(spec: ModelSpec) -> None:
    """Raises KeyError for an unknown family. With a second family, this becomes a lookup of its modules."""
    if spec.name not in catalogue():
        raise KeyError(f"no model family '{spec.name}'; there are: {', '.join(catalogue())}")
