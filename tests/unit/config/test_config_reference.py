"""One source of text: every key is explained, the JSON Schema agrees with the checks, the page is up to date."""

from __future__ import annotations

import tomllib

import jsonschema
import pytest

from quadriga.config import JobConfig, legacy_keys, rules_torchtitan, to_toml
from quadriga.config.keys import ITEM_KEYS, KEYS, format_toml
from quadriga.config.reference import documentation, json_schema, print_keys, reference_page
from quadriga.config.schema import Section


def test_every_key_has_a_sentence_of_its_own():
    documented = documentation()
    assert documented.keys() == KEYS.keys() | ITEM_KEYS.keys()
    for name, text in documented.items():
        assert text[0].isupper() or text[0] in "`[", name
        assert text.endswith("."), name
        assert "\n" not in text, name


def test_every_section_is_frozen_and_closed():
    for key in (*KEYS.values(), *ITEM_KEYS.values()):
        assert issubclass(key.section, Section)
        assert key.section.model_config["frozen"]
        assert key.section.model_config["extra"] == "forbid"


def test_every_default_is_a_value_that_is_allowed():
    """Pydantic does not check defaults: a wrong one would only be found when it is written out and read again."""
    assert JobConfig.model_validate(JobConfig().model_dump()) == JobConfig()


def test_older_names_lead_to_keys_of_today_and_are_none_themselves():
    for old, new in legacy_keys.RENAMED.items():
        assert new in KEYS
        assert old not in KEYS
    assert not (legacy_keys.REMOVED.keys() | legacy_keys.REFUSED.keys()) & KEYS.keys()
    assert legacy_keys.RENAMED_VALUES.keys() <= legacy_keys.RENAMED.keys()


def test_what_is_not_built_is_off_by_default():
    for feature in rules_torchtitan.UNSUPPORTED:
        assert set(feature.keys) <= KEYS.keys()
        assert not feature.requested(JobConfig())


def test_the_page_is_up_to_date(root):
    assert (root / "docs" / "configuration.md").read_text(encoding="utf-8") == reference_page(), "run: quadriga docs"


def test_the_page_lists_every_key_with_its_default():
    page = reference_page()
    for name, key in KEYS.items():
        assert f"| `{name.rpartition('.')[2]}` |" in page
        assert f"`{format_toml(key.default)}`" in page


@pytest.fixture(scope="module")
def schema():
    return json_schema()


def test_the_json_schema_is_valid_and_accepts_what_the_checks_accept(root, schema):
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(tomllib.loads(to_toml(JobConfig())))
    for file in root.glob("configs/*/*.toml"):
        validator.validate(tomllib.loads(file.read_text()))


@pytest.mark.parametrize(
    "text",
    [
        "[trainning]",
        "[training]\nstepz = 1",
        '[training]\nsteps = "many"',
        "[training]\nseq_len = 0",
        '[training]\ndtype = "float8"',
        "[optimizer]\nlr = -1.0",
        "extends = 3",
    ],
)
def test_the_json_schema_refuses_what_the_checks_refuse(text, write, refusal, schema):
    assert not jsonschema.Draft202012Validator(schema).is_valid(tomllib.loads(text))
    assert refusal(write(text))


def test_the_json_schema_has_the_documentation(schema):
    assert schema["$defs"]["Training"]["properties"]["seq_len"]["description"] == documentation()["training.seq_len"]
    assert schema["additionalProperties"] is False


def test_help_prints_all_keys_or_those_that_are_asked_for(capsys):
    print_keys()
    everything = capsys.readouterr().out
    assert all(f"--{name}" in everything for name in KEYS)
    print_keys(["memory_budget"])
    some = capsys.readouterr().out
    assert "--activation_checkpoint.memory_budget" in some
    assert "--training.steps" not in some
    print_keys(["training.sources"])
    some = capsys.readouterr().out
    assert "[[training.sources]]" in some
    assert "weight" in some
