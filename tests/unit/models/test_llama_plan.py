"""What the plan declares, against the model as built: every size, on meta."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from quadriga.models.plan import ParallelPlan
from quadriga.models.registry import build_model, catalogue, parallel_plan

SIZES = catalogue()["llama3"]


@pytest.mark.parametrize("flavor", SIZES)
def test_the_plan_names_exactly_the_parameters_that_the_model_has(flavor: str) -> None:
    spec = SIZES[flavor]
    with torch.device("meta"):
        model = build_model(spec)
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    planned = [(parameter.name, parameter.shape) for parameter in parallel_plan(spec).parameters]
    assert built == planned
    assert sum(math.prod(shape) for _, shape in built) == spec.n_parameters
    assert all(parameter.is_meta for parameter in model.parameters())
    assert set(model.state_dict()) == {name for name, _ in built}, "buffers must stay out of checkpoints"


def _unit_of(name: str, plan: ParallelPlan) -> int:
    """The unit that takes a parameter: the first whose module holds it, as when wrapping from the leaves up."""
    return next(
        index
        for index, unit in enumerate(plan.shard_units)
        if not unit.modules or any(name.startswith(f"{module}.") for module in unit.modules)
    )


@pytest.mark.parametrize("flavor", ["debugmodel", "1B", "8B"])
def test_shard_units_take_every_parameter_and_none_is_empty_but_the_root(flavor: str) -> None:
    plan = parallel_plan(SIZES[flavor])
    assert plan.shard_units[-1].modules == ()
    assert [unit for unit in plan.shard_units if not unit.modules] == [plan.shard_units[-1]]
    held: dict[int, list[str]] = {}
    for parameter in plan.parameters:
        held.setdefault(_unit_of(parameter.name, plan), []).append(parameter.name)
    assert set(held) >= set(range(len(plan.shard_units) - 1))
    in_root = held.get(len(plan.shard_units) - 1, [])
    assert in_root == (["tok_embeddings.weight", "norm.weight"] if SIZES[flavor].tie_embeddings else [])


def test_units_that_the_backward_pass_needs_first_are_kept() -> None:
    plan = parallel_plan(SIZES["8B"])
    assert [unit.modules for unit in plan.shard_units if not unit.reshard] == [("norm", "output"), ()]


def test_recompute_units_are_the_blocks_in_order() -> None:
    assert parallel_plan(SIZES["debugmodel"]).recompute_units == tuple(f"layers.{layer}" for layer in range(6))


PLAIN = ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1")
SCALED = ("attention.wo", "feed_forward.w2", "feed_forward.w3")


@pytest.mark.parametrize(
    ("depth_init", "first", "last"), [(True, 0.02 * 0.5**0.5, 0.0025), (False, 0.0025, 0.0025)], ids=["depth", "equal"]
)
def test_initial_distributions_of_the_8b_model(depth_init: bool, first: float, last: float) -> None:
    """0.02 / sqrt(2) in the first layer and 0.02 / sqrt(64) in the last of 32; or the latter in all of them."""
    plan = parallel_plan(dataclasses.replace(SIZES["8B"], depth_init=depth_init)).parameters
    initial = {each.name: (each.std, each.bound) for each in plan if each.init == "normal"}
    assert initial["tok_embeddings.weight"] == (1.0, math.inf)
    assert initial["output.weight"] == (1 / 64, 3 / 64)
    for layer, scaled in ((0, first), (31, last)):
        for name in PLAIN:
            assert initial[f"layers.{layer}.{name}.weight"] == (0.02, 2.0)
        for name in SCALED:
            assert initial[f"layers.{layer}.{name}.weight"] == (pytest.approx(scaled, rel=1e-9), 2.0)
    assert len(initial) == 2 + 32 * len(PLAIN + SCALED)
    ones = {each.name for each in plan if each.init == "ones"}
    assert ones == {"norm.weight"} | {
        f"layers.{n}.{name}.weight" for n in range(32) for name in ("attention_norm", "ffn_norm")
    }


@pytest.mark.parametrize("flavor", ["1B", "3B"])
def test_a_tied_matrix_begins_as_an_output_layer_would(flavor: str) -> None:
    tied = parallel_plan(SIZES[flavor]).parameters[0]
    assert (tied.name, tied.std, tied.bound) == ("tok_embeddings.weight", 0.02, pytest.approx(0.06))
