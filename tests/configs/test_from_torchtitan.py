"""docs/from-torchtitan.md has every key of v0.2.2, agrees with the schema, and each claim in it is provoked."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.config.keys import KEYS, format_toml
from quadriga.config.legacy_keys import RENAMED
from quadriga.config.torchtitan import regenerate, same_default, titan_keys, titan_rows
from quadriga.errors import UserError
from quadriga.models.registry import catalogue

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-torchtitan.md"
ROWS = Path(__file__).resolve().parents[2] / "quadriga" / "config" / "torchtitan_rows.toml"


# Their notice is about another key that is set, or about their own that is not.
BY_ANOTHER_KEY = {"checkpoint.last_save_model_only", "quantize.linear.float8.filter_fqns"}


def launched(text: str, ranks: int, folder: Path) -> tuple[str, ...]:
    """The notices of a start."""
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    argv = ["--job.config_file", str(file)]
    return read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=ranks, training=True).spec.notices


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert regenerate(text) == text, "run: quadriga docs"
    for name in titan_keys():
        assert f"| `{name.rpartition('.')[2]}` |" in text, name


def test_every_key_of_the_release_has_one_row() -> None:
    there, rows_file = titan_keys(), tomllib.loads(ROWS.read_text(encoding="utf-8"))
    assert len(there) == 149
    listed = [*rows_file["same"], *(name for name, value in rows_file.items() if isinstance(value, dict))]
    assert sorted(listed) == sorted(set(listed)), "listed twice"
    assert set(listed) == set(there)


def test_every_key_of_the_release_is_one_of_ours_or_has_a_new_name() -> None:
    there = set(titan_keys())
    assert there - set(KEYS) == {"model.tokenizer_path", "parallelism.context_parallel_rotate_method"} <= set(RENAMED)


def test_a_default_of_another_value_has_a_row_that_says_so() -> None:
    documented, others = titan_rows(), set()
    for name, there in titan_keys().items():
        if not same_default(name, there):
            others.add(name)
            assert documented[name].differs, (
                f"{name}: there {format_toml(there.default)}, here {format_toml(KEYS[name].default)}"
            )
    assert others == {
        "profiling.save_traces_folder",
        "profiling.profiler_active",
        "model.hf_assets_path",
        "training.dataset",
        "checkpoint.last_save_model_only",
        "debug.seed",
        "quantize.linear.float8.filter_fqns",
        "validation.local_batch_size",
        "validation.seq_len",
        "validation.steps",
    }


def test_every_row_says_what_is_printed_and_which_key_decides() -> None:
    for name, row in titan_rows().items():
        assert (row.same is None) != (row.differs is None), name
        assert row.free is not bool(row.printed or row.refused) or row.same is not None, f"{name}: printed, or free"
        assert bool(row.key) == (row.differs is not None), f"{name}: the key that decides"
        assert bool(row.refuses) == bool(row.refused), name
        for example in (row.example, row.refuses):
            tables = tomllib.loads(example)
            assert not tables or _holds(tables, name) or name in BY_ANOTHER_KEY, f"{name}: {example}"


def _holds(tables: dict, key: str) -> bool:
    value = tables
    for part in key.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return value != {}


PRINTED = sorted(name for name, row in titan_rows().items() if row.printed)
REFUSED = sorted(name for name, row in titan_rows().items() if row.refused)


@pytest.mark.parametrize("name", PRINTED)
def test_a_notice_is_printed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the example, and not by a file that says nothing (but for the default that the notice is about)."""
    monkeypatch.chdir(tmp_path)
    row = titan_rows()[name]
    assert any(row.printed in notice for notice in launched(row.example, row.ranks, tmp_path))
    by_default = row.example == "" or name == "training.mixed_precision_param"
    if not by_default:
        assert not any(row.printed in notice for notice in launched("", row.ranks, tmp_path))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_reported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = titan_rows()[name]
    with pytest.raises(UserError) as refusal:
        launched(row.refuses, row.ranks, tmp_path)
    assert row.refused in refusal.value.report
    assert len(refusal.value.problems) == 1, refusal.value.report


@pytest.mark.parametrize("name", sorted(name for name, there in titan_keys().items() if "Literal" in there.type))
def test_every_value_that_the_release_names_is_known(name: str, tmp_path: Path, monkeypatch) -> None:
    """It is accepted, or refused for a reason that is not the value itself."""
    monkeypatch.chdir(tmp_path)
    (choices,) = re.findall(r"Literal(\[[^]]*\])", titan_keys()[name].type)
    table, _, key = name.rpartition(".")
    for value in ast.literal_eval(choices):
        report = ""
        try:
            launched(f"[{table}]\n{key} = {format_toml(value)}", 1, tmp_path)
        except UserError as error:
            report = error.report
        assert "unknown value" not in report, report


def test_the_bare_defaults_are_reported_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that says nothing: each difference that numbers depend on is one line."""
    monkeypatch.chdir(tmp_path)
    notices = launched("", 1, tmp_path)
    for text in ("debug.seed is 42", "training.mixed_precision_param = bfloat16"):
        assert sum(text in notice for notice in notices) == 1


@pytest.mark.parametrize(
    ("degrees", "ranks", "dtype", "expected"),
    [
        ("", 1, "float32", "torch.autocast"),
        ("data_parallel_shard_degree = 1\ndata_parallel_replicate_degree = 2", 2, "float32", "torch.autocast"),
        ("tensor_parallel_degree = 2", 2, "float32", "training.dtype (float32)"),
        ("pipeline_parallel_degree = 2", 2, "float32", "training.dtype (float32)"),
        ("tensor_parallel_degree = 2", 2, "bfloat16", None),
        ("tensor_parallel_degree = 2", 4, "float32", None),
        ("context_parallel_degree = 2", 2, "float32", None),
        ("", 2, "float32", None),
    ],
)
def test_the_computing_format_is_reported_where_there_is_no_fsdp(
    degrees: str, ranks: int, dtype: str, expected: str | None, tmp_path: Path
) -> None:
    notices = launched(f'[parallelism]\n{degrees}\n[training]\ndtype = "{dtype}"', ranks, tmp_path)
    matching = [notice for notice in notices if "training.mixed_precision_param" in notice]
    assert len(matching) == (expected is not None)
    assert expected is None or expected in matching[0]
