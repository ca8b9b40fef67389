"""What the plan declares, against the model as built: every size, on meta."""

from __future__ import annotations

import math

import pytest
import torch

from quadriga.models.plan import ParallelPlan
from quadriga.models.registry import build_model, catalogue, count_parameters, parallel_plan

SIZES = catalogue()["llama3"]


@pytest.mark.parametrize("flavor", SIZES)
def test_the_plan_names_exactly_the_parameters_that_the_model_has(flavor: str) -> None:
    spec = SIZES[flavor]
    with torch.device("meta"):
        model = build_model(spec)
    built = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    planned = [(parameter.name, parameter.shape) for parameter in parallel_plan(spec).parameters]
    assert built == planned
    assert sum(math.prod(shape) for _, shape in built) == count_parameters(spec)
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


def test_initial_deviations() -> None:
    std = {parameter.name: parameter.std for parameter in parallel_plan(SIZES["8B"]).parameters}
    assert std["tok_embeddings.weight"] == std["layers.31.attention.wq.weight"] == 0.02
    assert std["layers.0.attention.wo.weight"] == pytest.approx(0.02 / math.sqrt(2))
    assert std["layers.31.feed_forward.w2.weight"] == pytest.approx(0.02 / 8)
    assert std["output.weight"] == 1 / 64
    ones = {parameter.name for parameter in parallel_plan(SIZES["8B"]).parameters if parameter.init == "ones"}
    assert ones == {name for name in std if name.split(".")[-2].endswith("norm")}
