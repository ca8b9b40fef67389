"""`to_toml` says all: reading it back gives the same configuration, whatever that is."""

from __future__ import annotations

import typing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quadriga.config import JobConfig, to_toml
from quadriga.config.keys import ITEM_KEYS, KEYS, Key, _unwrap_annotated, is_section
from quadriga.config.load import _nested, load
from quadriga.config.schema import Section

# Of a path, `~` and `$` stand for folders and variables, which this machine may not have.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00~$"), max_size=12)


def values(key: Key) -> st.SearchStrategy[Any]:
    """Any value that the schema allows for a key."""
    some = st.one_of([of_kind(kind, key.field.metadata) for kind in key.kinds])
    if key.field.examples:
        some = st.sampled_from(key.field.examples)
    if key.optional:
        some = some.filter(lambda value: not isinstance(value, str) or value.lower() not in ("", "none")) | st.none()
    return some


def of_kind(kind: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    kind, metadata = _unwrap_annotated(kind, metadata)
    if typing.get_origin(kind) is Literal:
        return st.sampled_from(typing.get_args(kind))
    if is_section(kind):
        return tables(kind)
    if typing.get_origin(kind) is dict:
        return st.dictionaries(TEXT, st.floats(0, allow_infinity=False), max_size=3)
    if typing.get_origin(kind) is tuple:
        return st.lists(of_kind(typing.get_args(kind)[0], []), max_size=3).map(tuple)
    if kind is bool:
        return st.booleans()
    if kind is str:
        return TEXT.filter(bool)
    low = next((limit for limit in metadata if isinstance(limit, Ge | Gt)), None)
    high = next((limit for limit in metadata if isinstance(limit, Le | Lt)), None)
    least = getattr(low, "ge", None) if isinstance(low, Ge) else getattr(low, "gt", None)
    most = getattr(high, "le", None) if isinstance(high, Le) else getattr(high, "lt", None)
    if kind is int:
        return st.integers(least, 2**40 if most is None else most - 1).filter(lambda value: value != 0 or least == 0)
    return st.floats(
        least, most, exclude_min=isinstance(low, Gt), exclude_max=isinstance(high, Lt), allow_infinity=False
    )


@st.composite
def tables(draw: st.DrawFn, section: type[Section]) -> Section:
    """Any table of a list. A name has a form of its own."""
    keys = [key for key in ITEM_KEYS.values() if key.section is section]
    made = {key.name.rpartition(".")[2]: draw(values(key)) for key in keys if not key.name.endswith(".name")}
    return section.model_validate(made)


@st.composite
def configurations(draw: st.DrawFn) -> JobConfig:
    chosen = draw(st.sets(st.sampled_from(sorted(KEYS.keys() - {"job.config_file"})), max_size=25))
    return JobConfig.model_validate(_nested({name: draw(values(KEYS[name])) for name in sorted(chosen)}))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(config=configurations())
def test_reading_back_gives_the_same(config):
    Path("again.toml").write_text(to_toml(config), encoding="utf-8")
    loaded = load(["--job.config_file", "again.toml"], {})
    assert not loaded.problems, "\n".join(map(str, loaded.problems))
    job = loaded.config.job.model_copy(update={"config_file": None})
    assert loaded.config.model_copy(update={"job": job}) == config
    assert set(loaded.origin) == KEYS.keys()  # every key is said


def test_what_was_written_can_be_resolved_again(read_config, write):
    run = read_config("--training.steps", "3", "--lr_scheduler.decay_ratio", "0.5", "--model.n_layers", "2")
    again = read_config(write(to_toml(run.config)))
    notices = tuple(notice for notice in run.spec.notices if " by default, so that " not in notice)
    assert len(notices) == len(run.spec.notices) - 2  # of files and of the seed: said where the keys are not
    assert again.spec == replace(run.spec, notices=notices)


@pytest.mark.parametrize("name", sorted(KEYS.keys() - {"job.config_file"}))
def test_every_number_and_string_can_be_given_on_the_command_line(name):
    """As text, which a type that takes numbers alone must have turned into one."""
    for value in {KEYS[name].default, *KEYS[name].choices}:
        if value not in (None, "", ()) and tuple not in map(typing.get_origin, KEYS[name].kinds):
            given = load([f"--{name}={str(value).lower() if isinstance(value, bool) else value}"], {}).config
            for part in name.split("."):
                given = getattr(given, part)
            assert given == value
