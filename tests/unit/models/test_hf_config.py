"""A `config.json` as a ModelSpec: there and back for every size, in both spellings, with transformers' defaults."""

from __future__ import annotations

import copy
import dataclasses

import pytest

from quadriga.config.model_spec import ModelSpec, RopeScaling
from quadriga.errors import UserError
from quadriga.models.registry import catalogue, hf_config, positions_from_hf, spec_from_hf, tensor_names

SIZES = list(catalogue()["llama3"].values())
ODD = ModelSpec(
    name="llama3",
    flavor="hf",
    dim=96,
    n_layers=3,
    n_heads=6,
    n_kv_heads=2,
    ffn_dim=200,
    vocab_size=1001,
    rope_theta=1234.5,
    rope_scaling=RopeScaling(3.0, 1.5, 5.5, 77),
    norm_eps=3e-6,
    tie_embeddings=True,
)


@pytest.mark.parametrize("spec", [*SIZES, ODD], ids=lambda spec: spec.flavor)
def test_every_number_comes_back_and_flavors_of_ours_are_known(spec):
    config = hf_config(spec, bos_id=None, eos_id=None)
    assert spec_from_hf(config, "config.json") == spec
    assert tensor_names(spec).config_differences(config, "config.json") == []


@pytest.mark.parametrize("spec", [ODD, dataclasses.replace(ODD, rope_scaling=None)], ids=["scaled", "plain"])
def test_the_spelling_of_transformers_is_read(spec):
    from transformers import LlamaConfig

    theirs = LlamaConfig(**hf_config(spec, bos_id=1, eos_id=2)).to_dict()
    assert "rope_parameters" in theirs, "if this fails: both spellings are the same again"
    assert spec_from_hf(theirs, "config.json") == spec


def test_where_a_file_is_silent_the_defaults_of_transformers_hold():
    from transformers import LlamaConfig

    minimal = {
        "model_type": "llama",
        "hidden_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "intermediate_size": 200,
        "vocab_size": 1001,
    }
    explicit = LlamaConfig(**{name: value for name, value in minimal.items() if name != "model_type"}).to_dict()
    assert spec_from_hf(minimal, "config.json") == spec_from_hf(explicit, "config.json")
    nulls = dict.fromkeys(("rope_scaling", "rope_parameters", "num_key_value_heads", "head_dim", "rms_norm_eps"))
    assert spec_from_hf(minimal | nulls, "config.json") == spec_from_hf(explicit, "config.json")


def test_every_difference_is_reported_with_its_key():
    other = dataclasses.replace(
        ODD, dim=192, n_heads=12, rope_theta=5.0, rope_scaling=None, norm_eps=1e-5, tie_embeddings=False
    )
    problems = tensor_names(ODD).config_differences(hf_config(other, bos_id=None, eos_id=None), "there/config.json")
    report = "\n".join(map(str, problems))
    assert len(problems) == 6
    for field, key in (
        ("hidden_size", "model.dim"),
        ("num_attention_heads", "model.n_heads"),
        ("rope_theta", "model.rope_theta"),
        ("rope_scaling", "model.rope_scaling"),
        ("rms_norm_eps", "model.flavor"),
        ("tie_word_embeddings", "model.tie_embeddings"),
    ):
        assert any(field in problem.what and key in problem.what for problem in problems), (field, report)


def test_positions_are_those_the_weights_were_made_for():
    plain = dataclasses.replace(ODD, rope_scaling=None)
    for spec, positions, longest in ((plain, 100, 100), (ODD, 512, 512), (plain, 0, 8192), (ODD, 0, 131_072)):
        config = hf_config(spec, bos_id=3, eos_id=4, positions=positions)
        assert (config["max_position_embeddings"], config["bos_token_id"], config["eos_token_id"]) == (longest, 3, 4)
        assert positions_from_hf(config) == longest
    for nonsense in (None, "many", -1, 0, 1.5, True, 10**30):
        assert positions_from_hf({"max_position_embeddings": nonsense}) == 0


def test_how_weights_are_drawn_is_not_exported() -> None:
    """What is exported is trained; `depth_init` would say nothing of it."""
    drawn_otherwise = dataclasses.replace(ODD, depth_init=False)
    exported = hf_config(drawn_otherwise, bos_id=1, eos_id=2)
    assert exported == hf_config(ODD, bos_id=1, eos_id=2)
    assert spec_from_hf(exported, "config.json") == spec_from_hf(hf_config(ODD, bos_id=1, eos_id=2), "config.json")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {**LLAMA3, ORIGINAL: 512}, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {**LLAMA3, ORIGINAL: 512}, ORIGINAL: 1024},
    ],
)
def test_rotary_values_that_are_named_twice_are_those_of_transformers(rope):
    from transformers import LlamaConfig

    config = hf_config(ODD, bos_id=None, eos_id=None)
    del config["rope_theta"], config["rope_scaling"]
    theirs = LlamaConfig(**config, **copy.deepcopy(rope)).rope_parameters
    ours = spec_from_hf(config | rope, "config.json")
    assert (ours.rope_theta, ours.rope_scaling.original_max_position) == (theirs["rope_theta"], theirs[ORIGINAL])


def test_a_fraction_of_a_position_is_refused():
    config = hf_config(ODD, bos_id=None, eos_id=None)
    with pytest.raises(UserError, match="whole number"):
        spec_from_hf(config | {"rope_scaling": {**LLAMA3, ORIGINAL: 8192.5}}, "config.json")


def test_rotary_frequencies_by_kind_of_layer_are_refused():
    """transformers 5 nests them for models with several kinds of layers; ignored, the base would be the default."""
    nested = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}}
    with pytest.raises(UserError, match="several kinds of rotary frequencies") as refused:
        spec_from_hf(
            {**hf_config(ODD, bos_id=None, eos_id=None), "rope_scaling": None, "rope_parameters": nested}, "config.json"
        )
    assert refused.value.problems[0].value == "full_attention"


def test_a_number_that_is_0_is_not_said_to_be_missing():
    scaling = {**hf_config(ODD, bos_id=None, eos_id=None)["rope_scaling"], "factor": 0}
    with pytest.raises(UserError) as refused:
        spec_from_hf({**hf_config(ODD, bos_id=None, eos_id=None), "rope_scaling": scaling}, "config.json")
    assert str(refused.value).endswith(
        "config.json, factor = [0]\n    the scaling of the rotary frequencies needs numbers above 0"
    )
