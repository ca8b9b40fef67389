"""The arithmetic of sizes, against published figures and hand calculation."""

from __future__ import annotations

import dataclasses

import pytest

from quadriga.models.registry import build_model, catalogue, flops_per_token, parallel_plan

SIZES = catalogue()["llama3"]

PUBLISHED = {
    "1B": 1_235_814_400,
    "3B": 3_212_749_824,
    "8B": 8_030_261_248,
    "70B": 70_553_706_496,
    "405B": 405_853_388_800,
}


@pytest.mark.parametrize(("flavor", "parameters"), PUBLISHED.items())
def test_parameter_counts_are_the_published_ones(flavor: str, parameters: int) -> None:
    assert SIZES[flavor].n_parameters == parameters


def test_the_debug_model_by_hand() -> None:
    layer = 4 * 256 * 256 + 3 * 256 * 768 + 2 * 256
    assert SIZES["debugmodel"].n_parameters == 2048 * 256 + 6 * layer + 256 + 2048 * 256


def test_every_size_is_listed_under_its_own_name() -> None:
    assert set(SIZES) == {"debugmodel", *PUBLISHED}
    for flavor, spec in SIZES.items():
        assert (spec.name, spec.flavor) == ("llama3", flavor)
        assert spec.dim % spec.n_heads == 0
        assert spec.n_heads % spec.n_kv_heads == 0


def test_only_the_small_llama_3_2_models_are_tied_and_scaled_by_32() -> None:
    scaled = {flavor: spec.rope_scaling.factor for flavor, spec in SIZES.items() if spec.rope_scaling is not None}
    assert scaled == {"debugmodel": 8, "1B": 32, "3B": 32, "8B": 8, "70B": 8, "405B": 8}
    assert {flavor for flavor, spec in SIZES.items() if spec.tie_embeddings} == {"1B", "3B"}


def test_flops_of_8b_at_8192_by_hand() -> None:
    weights = 6 * (8_030_261_248 - 128_256 * 4096)
    attention = 6 * 32 * 32 * 128 * 8192
    assert flops_per_token(SIZES["8B"], 8192) == weights + attention
    assert flops_per_token(SIZES["8B"], 8192) == pytest.approx(5.15e10, rel=1e-3)


def test_a_tied_embedding_counts_once_and_in_full() -> None:
    tied = SIZES["1B"]
    untied = dataclasses.replace(tied, tie_embeddings=False)
    assert untied.n_parameters - tied.n_parameters == 128_256 * 2048
    assert flops_per_token(tied, 4096) == flops_per_token(untied, 4096)


def test_attention_costs_in_proportion_to_the_sequence() -> None:
    spec = SIZES["8B"]
    per_position = flops_per_token(spec, 1025) - flops_per_token(spec, 1024)
    assert per_position == 6 * 32 * 4096


@pytest.mark.parametrize("use", [build_model, parallel_plan])
def test_an_unknown_family_is_refused_by_name(use) -> None:
    with pytest.raises(KeyError, match=r"'mamba'.*llama3"):
        use(dataclasses.replace(SIZES["8B"], name="mamba"))
