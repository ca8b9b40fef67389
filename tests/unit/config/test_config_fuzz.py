"""Whatever is written: the configuration checks answer with a run or with problems, never with anything else."""

from __future__ import annotations

from pathlib import Path

import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.config.keys import KEYS
from quadriga.config.legacy_keys import REFUSED, REMOVED, RENAMED
from quadriga.config.reference import tables
from quadriga.errors import MAX_PROBLEMS, UserError, printable
from quadriga.models.registry import catalogue

QUIET = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
TOML_VALUES = st.recursive(
    SCALARS.filter(lambda value: value is not None)
    | st.dates()
    | st.sampled_from([1, 2, -1, "none", "op", "8B", "text"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)
TABLES = st.sampled_from([name for name, _, _ in tables()]) | st.text(max_size=6)
LEAVES = st.sampled_from([key.rpartition(".")[2] for key in (*KEYS, *RENAMED, *REMOVED, *REFUSED)]) | st.text(
    max_size=6
)
WORDS = (
    st.sampled_from([f"--{key}" for key in (*KEYS, *RENAMED, *REMOVED, *REFUSED)])
    | st.sampled_from(["1", "true", "none", "[", "[1]", "a,b", "--", "--.", "--a.b=", "=", "builtin", "2"])
    | st.text(max_size=6)
)


def run_or_problems(argv, ranks, training):
    problems = ()
    try:
        run = read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=ranks, training=training)
    except UserError as error:
        problems, report = error.problems, error.report
    if problems:
        assert all(printable(problem.where) in report for problem in problems[:MAX_PROBLEMS])
    else:
        assert run.spec.world_size == ranks


@QUIET
@given(
    document=st.dictionaries(TABLES, st.dictionaries(LEAVES, TOML_VALUES, max_size=4) | TOML_VALUES, max_size=4),
    ranks=st.integers(1, 9),
)
def test_any_toml(document, ranks):
    text = tomli_w.dumps(document)
    Path("any.toml").write_text(text, encoding="utf-8")
    run_or_problems(["--job.config_file", "any.toml"], ranks, training=False)


@QUIET
@given(text=st.binary(max_size=40))
def test_any_bytes(text):
    Path("any.toml").write_bytes(text)
    run_or_problems(["--job.config_file", "any.toml"], 1, training=True)


@QUIET
@given(argv=st.lists(WORDS, max_size=8), ranks=st.integers(1, 9), training=st.booleans())
def test_any_command_line(argv, ranks, training):
    run_or_problems(argv, ranks, training)
