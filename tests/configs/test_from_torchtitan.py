"""docs/from-torchtitan.md has every key of v0.2.2, agrees with the schema, and each claim in it is provoked."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from quadriga.comm.backend import BACKENDS
from quadriga.config import read
from quadriga.config.keys import KEYS, show
from quadriga.config.torchtitan import keys_there, ours, renewed, rows, same_default
from quadriga.config.vocabulary import RENAMED
from quadriga.errors import UserError
from quadriga.models.registry import catalogue

PAGE = Path(__file__).resolve().parents[2] / "docs" / "from-torchtitan.md"
ROWS = Path(__file__).resolve().parents[2] / "quadriga" / "config" / "torchtitan_rows.toml"


def launched(text: str, ranks: int, folder: Path) -> tuple[str, ...]:
    """The notices of a start."""
    file = folder / "run.toml"
    file.write_text(text, encoding="utf-8")
    argv = ["--job.config_file", str(file)]
    return read(argv, {}, catalogue=catalogue(), backends=BACKENDS, world_size=ranks, training=True).spec.notices


def test_the_page_is_up_to_date() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert renewed(text) == text, "run: quadriga docs"
    for name in keys_there():
        assert f"| `{name.rpartition('.')[2]}` |" in text, name


def test_every_key_of_the_release_has_one_row() -> None:
    there, told = keys_there(), tomllib.loads(ROWS.read_text(encoding="utf-8"))
    assert len(there) == 149
    said = [*told["same"], *(name for name, value in told.items() if isinstance(value, dict))]
    assert sorted(said) == sorted(set(said)), "said twice"
    assert set(said) == set(there)


def test_every_key_of_ours_is_one_of_the_release_or_listed() -> None:
    there = set(keys_there())
    assert set(ours()) == set(KEYS) - there
    assert len(ours()) == len(set(ours()))
    assert there - set(KEYS) == {"model.tokenizer_path", "parallelism.context_parallel_rotate_method"} <= set(RENAMED)


def test_a_default_of_another_value_has_a_row_that_says_so() -> None:
    said, others = rows(), set()
    for name, there in keys_there().items():
        if not same_default(name, there):
            others.add(name)
            assert said[name].differs, f"{name}: there {show(there.default)}, here {show(KEYS[name].default)}"
    assert others == {
        "profiling.save_traces_folder",
        "profiling.profiler_active",
        "model.hf_assets_path",
        "training.dataset",
        "checkpoint.last_save_model_only",
        "debug.seed",
    }


def test_every_row_says_what_is_printed_and_which_key_decides() -> None:
    for name, row in rows().items():
        assert (row.same is None) != (row.differs is None), name
        assert row.free is not bool(row.printed or row.refused) or row.same is not None, f"{name}: printed, or free"
        assert bool(row.key) == (row.differs is not None), f"{name}: the key that decides"
        assert bool(row.refuses) == bool(row.refused), name
        for example in (row.example, row.refuses):
            tables = tomllib.loads(example)
            assert not tables or _holds(tables, name) or name == "checkpoint.last_save_model_only", f"{name}: {example}"


def _holds(tables: dict, key: str) -> bool:
    value = tables
    for part in key.split("."):
        value = value.get(part, {}) if isinstance(value, dict) else {}
    return value != {}


PRINTED = sorted(name for name, row in rows().items() if row.printed)
REFUSED = sorted(name for name, row in rows().items() if row.refused)


@pytest.mark.parametrize("name", PRINTED)
def test_a_notice_is_printed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the example, and not by a file that says nothing (but for the default that the notice is about)."""
    monkeypatch.chdir(tmp_path)
    row = rows()[name]
    assert any(row.printed in notice for notice in launched(row.example, row.ranks, tmp_path))
    by_default = row.example == "" or name == "training.mixed_precision_param"
    if not by_default:
        assert not any(row.printed in notice for notice in launched("", row.ranks, tmp_path))


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    row = rows()[name]
    with pytest.raises(UserError) as refusal:
        launched(row.refuses, row.ranks, tmp_path)
    assert row.refused in refusal.value.report
    assert len(refusal.value.problems) == 1, refusal.value.report


@pytest.mark.parametrize("name", sorted(name for name, there in keys_there().items() if "Literal" in there.type))
def test_every_value_that_the_release_names_is_known(name: str, tmp_path: Path, monkeypatch) -> None:
    """It is accepted, or refused for a reason that is not the value itself."""
    monkeypatch.chdir(tmp_path)
    (choices,) = re.findall(r"Literal(\[[^]]*\])", keys_there()[name].type)
    table, _, key = name.rpartition(".")
    for value in ast.literal_eval(choices):
        said = ""
        try:
            launched(f"[{table}]\n{key} = {show(value)}", 1, tmp_path)
        except UserError as error:
            said = error.report
        assert "unknown value" not in said, said


def test_the_bare_defaults_are_told_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that says nothing: each difference that numbers depend on is one line."""
    monkeypatch.chdir(tmp_path)
    notices = launched("", 1, tmp_path)
    for words in ("debug.seed is 42", "training.mixed_precision_param = bfloat16"):
        assert sum(words in notice for notice in notices) == 1


@pytest.mark.parametrize(
    ("degrees", "ranks", "dtype", "said"),
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
def test_the_computing_format_is_told_where_there_is_no_fsdp(
    degrees: str, ranks: int, dtype: str, said: str | None, tmp_path: Path
) -> None:
    notices = launched(f'[parallelism]\n{degrees}\n[training]\ndtype = "{dtype}"', ranks, tmp_path)
    told = [notice for notice in notices if "training.mixed_precision_param" in notice]
    assert len(told) == (said is not None)
    assert said is None or said in told[0]
