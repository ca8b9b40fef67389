"""How a model is cut into pipeline stages."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quadriga.models.plan import split_stages, stage_shares
from quadriga.models.registry import catalogue, parallel_plan

SIZES = catalogue()["llama3"]
ENDS = ("tok_embeddings",), ("norm", "output")


def plan_of(layers: int):
    return parallel_plan(replace(SIZES["debugmodel"], n_layers=layers))


@pytest.mark.parametrize(
    ("layers", "count", "first", "last", "shares"),
    [
        (4, 2, 1, 1, (2, 2)),
        (5, 2, 1, 1, (3, 2)),
        (5, 2, 0, 0, (3, 2)),
        (4, 4, 1, 1, (1, 2, 1, 0)),
        (8, 4, 1, 1, (2, 3, 2, 1)),
        (32, 4, 1, 1, (8, 9, 8, 7)),
        (126, 16, 1, 1, (7, *(8,) * 14, 7)),
        (6, 2, 2, 0, (2, 4)),
        (3, 2, 3, 0, (0, 3)),
        (3, 2, 4, 0, (0, 3)),
        (3, 2, 5, 0, (-1, 4)),
    ],
)
def test_layers_are_balanced_with_the_weights_of_the_ends(layers, count, first, last, shares):
    assert stage_shares(layers, count, first, last) == shares
    assert sum(shares) == layers


@pytest.mark.parametrize("layers", [2, 3, 5, 8, 31])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_stages_are_the_whole_model_in_order(layers, count):
    if count > layers:
        return
    plan = plan_of(layers)
    stages = split_stages(plan, count, 1, 1)
    assert len(stages) == count
    assert tuple(unit for stage in stages for unit in stage) == plan.stage_units
    parts = [plan.of_stage(stage) for stage in stages]
    assert tuple(each for part in parts for each in part.parameters) == plan.parameters
    assert tuple(each for part in parts for each in part.recompute_units) == plan.recompute_units
    assert tuple(each for part in parts for each in part.tensor_cuts) == plan.tensor_cuts
    assert all(part.shard_units[-1].modules == () for part in parts)  # each part has a root of its own


def test_an_end_that_weighs_more_than_a_stage_is_an_error():
    with pytest.raises(ValueError, match="cannot be split into 2 stages"):
        split_stages(plan_of(3), 2, 5, 0)
