"""Which models there are. Importing this imports no torch: a family's code is loaded when a function needs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quadriga.config.model_spec import ModelSpec
from quadriga.models.llama import hf_config as llama_hf_config
from quadriga.models.llama import hf_names as llama_hf_names
from quadriga.models.llama import operations as llama_operations
from quadriga.models.llama import plan as llama_plan
from quadriga.models.llama import spec as llama_spec
from quadriga.models.llama import titan_names as llama_titan_names
from quadriga.models.operations import Cut, Kernels, Trace
from quadriga.models.plan import ParallelPlan

if TYPE_CHECKING:
    from torch import nn


def catalogue() -> Mapping[str, Mapping[str, ModelSpec]]:
    """Every size by `model.name` and `model.flavor`."""
    return {"llama3": llama_spec.SIZES}


def build_model(spec: ModelSpec) -> nn.Module:
    """The model on the current default device; under `torch.device("meta")` it holds no memory whatever its size."""
    _known(spec)
    from quadriga.models.llama.model import Llama

    return Llama(spec)


def parallel_plan(spec: ModelSpec) -> ParallelPlan:
    """How the model may be cut, and how each of its parameters is initialized."""
    _known(spec)
    return llama_plan.parallel_plan(spec)


def block_trace(spec: ModelSpec, cut: Cut, kernels: Kernels) -> Trace:
    """What one block computes, operation by operation."""
    _known(spec)
    return llama_operations.block_trace(spec, cut, kernels)


def head_trace(spec: ModelSpec, cut: Cut, kernels: Kernels) -> Trace:
    """What follows the last block: a norm and the logits."""
    _known(spec)
    return llama_operations.head_trace(spec, cut, kernels)


def count_parameters(spec: ModelSpec) -> int:
    """The trained numbers of the model, tied ones once."""
    _known(spec)
    return llama_spec.count_parameters(spec)


def flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Forward and backward, attention halved for causality, the input embedding left out unless tied, no recompute."""
    _known(spec)
    return llama_spec.flops_per_token(spec, seq_len)


def hf_names(spec: ModelSpec) -> llama_hf_names.HfNames:
    """The model's tensors on both sides of the Hugging Face door."""
    _known(spec)
    return llama_hf_names.HfNames(spec)


def titan_names(spec: ModelSpec) -> llama_titan_names.TitanNames:
    """The model's tensors in a checkpoint of torchtitan."""
    _known(spec)
    return llama_titan_names.TitanNames(spec)


def hf_config(spec: ModelSpec, *, bos_id: int | None, eos_id: int | None, positions: int = 0) -> dict[str, Any]:
    """The fields of a Hugging Face `config.json` but the dtype. Unknown token ids are null, since a field that is left
    out means token 1 or 2. `positions`: of the longest sequences that the weights were made for; where that is not
    known (0), the published number of models of this kind."""
    _known(spec)
    config: dict[str, Any] = llama_hf_names.hf_config(spec)
    longest = positions or config["max_position_embeddings"]
    return {**config, "max_position_embeddings": longest, "bos_token_id": bos_id, "eos_token_id": eos_id}


def positions_from_hf(config: Mapping[str, Any]) -> int:
    """For how many positions the weights beside a `config.json` were made; 0 where it does not say."""
    return llama_hf_config.positions(config)


def spec_from_hf(config: Mapping[str, Any], where: str) -> ModelSpec:
    """The model that a `config.json` describes; a flavor of ours has its name, another is called `hf`. Raises UserError
    for a model that is not built here; `where` names the file in it."""
    spec = llama_hf_config.spec_from_hf(config, where)
    flavors = catalogue()[spec.name]
    known = (flavor for flavor, size in flavors.items() if replace(size, flavor="") == spec)
    return replace(spec, flavor=next(known, "hf"))


def _known(spec: ModelSpec) -> None:
    """A second family turns this into a look-up of its modules."""
    if spec.name not in catalogue():
        raise KeyError(f"no model family '{spec.name}'; there are: {', '.join(catalogue())}")
