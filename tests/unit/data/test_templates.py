"""`dataset_template`: documents of several fields."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quadriga.cli.main import main
from quadriga.config.schema import TextKeys, Training
from quadriga.config.templates import parse_template
from quadriga.data.catalogue import open_source
from quadriga.data.sources import BadRecord
from quadriga.data.streams import record_size
from quadriga.errors import UserError

TEMPLATE = "# {title}\n{{{text}}}\n"
RECORDS = [{"title": "One", "text": "first\nline"}, {"title": "Zwei", "text": "漢字", "more": [1, 2]}]
EXPECTED = ["# One\n{first\nline}\n", "# Zwei\n{漢字}\n"]


def write(path, records):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def documents(keys: TextKeys) -> list[str]:
    source = open_source(keys)
    return [source.parse(record).text for shard in range(source.shards) for record in source.read(shard)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_documents_are_made_of_the_fields(tmp_path, name):
    path = write(tmp_path / name, RECORDS)
    assert documents(TextKeys(name[2:], path, template=TEMPLATE)) == EXPECTED
    assert documents(TextKeys(name[2:], path, template="{text}{title}{text}"))[0] == "first\nlineOnefirst\nline"
    assert documents(TextKeys(name[2:], path, template="{title}")) == ["One", "Zwei"]


@pytest.mark.parametrize(
    ("text", "literals", "names"),
    [
        ("{a}", ("", ""), ("a",)),
        ("{a}{a}", ("", "", ""), ("a", "a")),
        ("{{x}} {a b}}}", ("{x} ", "}"), ("a b",)),
        ("{{{{{a}", ("{{", ""), ("a",)),
    ],
)
def test_braces(text, literals, names):
    assert parse_template(text) == (literals, names)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("no field", "names no field"),
        ("", "names no field"),
        ("{a", "the `{` at character 1 belongs to no field"),
        ("a}", "the `}` at character 2 belongs to no field"),
        ("{a.b}", "`{a.b}` is not the plain name"),
        ("{a[0]}", "not the plain name"),
        ("{a!r}", "not the plain name"),
        ("{a:>9}", "not the plain name"),
        ("{}", "not the plain name"),
        ("{ }", "not the plain name"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_template(text)
    with pytest.raises(UserError) as refused:
        open_source(TextKeys("jsonl", write(tmp_path / "a.jsonl", RECORDS), "validation", template=text))
    assert refused.value.problems[0].where == "validation.dataset_template"
    assert reason in refused.value.problems[0].what


def test_a_record_without_one_of_the_fields_is_bad(tmp_path):
    good = {"title": "t", "text": "x"}
    wrong = {
        "the object has no `title`": {"text": "x"},
        "`text` is a JSON null": {"title": "t", "text": None},
        "`title` is a JSON number": {"title": 3, "text": "x"},
        "`text` is a JSON array": {"title": "t", "text": ["x"]},
        "`text` holds half of a surrogate pair": {"title": "t", "text": "\ud800"},
    }
    source = open_source(
        TextKeys("jsonl", write(tmp_path / "a.jsonl", [good, *wrong.values()]), template="{title}{text}")
    )
    (first, *rest) = source.read(0)
    assert source.parse(first).text == "tx"
    for line, (what, record) in enumerate(zip(wrong, rest, strict=True), 2):
        with pytest.raises(BadRecord) as caught:
            source.parse(record)
        (problem,) = caught.value.problems
        assert what in problem.what
        assert f"line {line}" in problem.where
        assert problem.allowed == 'one object per line: {"title": "...", "text": "..."}'


def test_a_row_with_a_null_is_bad_and_a_column_of_another_type_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", [{"t": "a", "n": 1}, {"t": None, "n": 2}])
    source = open_source(TextKeys("parquet", path, template="{t}{t}"))
    good, bad = source.read(0)
    assert source.parse(good).text == "aa"
    assert record_size(good) == 2
    with pytest.raises(BadRecord, match="`t` is null"):
        source.parse(bad)
    with pytest.raises(UserError, match="the column `n` is of type int64") as caught:
        open_source(TextKeys("parquet", path, template="{t}{n}"))
    assert "tokens" in str(caught.value.problems[0].fix)
    with pytest.raises(UserError, match="no column `x`") as caught:
        open_source(TextKeys("parquet", path, "training.sources[b]", template="{t}{x}"))
    assert caught.value.problems[0].fix == "name existing fields in training.sources[b].dataset_template"


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_document_that_becomes_too_long_is_bad(tmp_path, name, monkeypatch):
    monkeypatch.setattr("quadriga.limits.DOCUMENT_BYTES", 100)
    path = write(tmp_path / name, [{"t": "x" * 60}])
    assert documents(TextKeys(name[2:], path, template="{t}!")) == ["x" * 60 + "!"]
    with pytest.raises(BadRecord, match="longer than the limit"):
        documents(TextKeys(name[2:], path, template="{t}{t}"))


def test_the_fingerprint_has_the_template_and_stays_what_it_was_without(tmp_path):
    path = write(tmp_path / "a.jsonl", RECORDS)
    plain, one, other = (
        open_source(TextKeys("jsonl", path, template=each)).fingerprint for each in (None, TEMPLATE, "{text}")
    )
    assert len({plain, one, other}) == 3
    assert plain.count(":") == 2
    assert one.startswith(plain + ":template-")
    assert ";" not in one


def test_commands_have_it(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", RECORDS)
    assert main(["data", path, "--template", "{title}: {text}", "--rows", "1"]) == 0
    assert "One: first" in capsys.readouterr().out
    assert main(["tokenize", path, str(tmp_path / "ids"), "--tokenizer", "builtin:bytes", "--template", "{title}"]) == 0
    assert (tmp_path / "ids" / "00000.bin").stat().st_size == 2 * (len("One") + len("Zwei") + 4)
    capsys.readouterr()
    assert main(["data", path, "--template", "{title}", "--field", "text2"]) == 2
    assert "--template" in capsys.readouterr().err


def test_keys_give_it():
    assert Training(dataset="jsonl", dataset_template="{a}").text_keys.template == "{a}"
