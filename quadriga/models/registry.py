"""Which models there are. Importing this imports no torch: a family's code is loaded when a function needs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from quadriga.config.model_spec import ModelSpec
from quadriga.models.llama import plan as llama_plan
from quadriga.models.llama import spec as llama_spec
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
    """How the model may be cut, and how each of its parameters is born."""
    _known(spec)
    return llama_plan.parallel_plan(spec)


def count_parameters(spec: ModelSpec) -> int:
    """The trained numbers of the model, tied ones once."""
    _known(spec)
    return llama_spec.count_parameters(spec)


def flops_per_token(spec: ModelSpec, seq_len: int) -> float:
    """Forward and backward, attention halved for causality, the input embedding left out unless tied, no recompute."""
    _known(spec)
    return llama_spec.flops_per_token(spec, seq_len)


def _known(spec: ModelSpec) -> None:
    """A second family turns this into a look-up of its modules."""
    if spec.name not in catalogue():
        raise KeyError(f"no model family '{spec.name}'; there are: {', '.join(catalogue())}")
