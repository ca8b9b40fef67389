"""What files of outsiders do to the readers: read, or told in one message with file and place, at a bounded cost."""

from __future__ import annotations

import gzip
import json
import logging
import os
import resource
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from quadriga import limits
from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data import columns
from quadriga.data.catalogue import open_source
from quadriga.data.stream_loader import build_loader
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

GOOD = b'{"text": "a good line, long enough for a window"}\n'
SENTENCES = [f"sentence number {i} with a few words" for i in range(40)]
COLUMNS = {
    "string": pa.array(SENTENCES),
    "large_string": pa.array(SENTENCES, pa.large_string()),
    "string_view": pa.array(SENTENCES, pa.string_view()),
    "binary": pa.array([text.encode() for text in SENTENCES], pa.binary()),
    "large_binary": pa.array([text.encode() for text in SENTENCES], pa.large_binary()),
    "binary_view": pa.array([text.encode() for text in SENTENCES], pa.binary_view()),
    "dictionary": pa.array(SENTENCES).dictionary_encode(),
    "dictionary of large strings": pa.array(SENTENCES, pa.large_string()).dictionary_encode(),
}


def texts(kind: str, path: Path, field: str = "text") -> list[str]:
    source = open_source(TextKeys(kind, str(path), field=field))
    return [source.parse(record).text for shard in range(source.shards) for record in source.read(shard)]


def refused(kind: str, path: Path | str, field: str = "text", **options):
    """The one problem of a start on these data."""
    with pytest.raises(UserError) as caught:
        build(kind, path, field, **options).close()
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def build(kind: str, path: Path | str, field: str = "text", **options):
    return build_loader(
        TextKeys(kind, str(path), field=field),
        ByteTokenizer(),
        seed=1,
        seq_len=16,
        global_batch_size=4,
        rows=range(4),
        dataloader=Dataloader(**options),
    )


# --- columns and fields ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", COLUMNS)
def test_every_column_of_text_is_read(tmp_path, kind):
    pyarrow.parquet.write_table(pa.table({"text": COLUMNS[kind]}), tmp_path / "a.parquet", row_group_size=9)
    assert texts("parquet", tmp_path / "a.parquet") == SENTENCES


@pytest.mark.parametrize("kind", COLUMNS)
def test_bytes_that_are_no_text_are_named_by_row(tmp_path, kind):
    raw = pa.array([b"good", b"caf\xe9", b"good"])
    column = raw.dictionary_encode() if kind.startswith("dictionary") else raw
    if kind in ("string", "string_view"):
        column = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
        column = column.view(pa.string()) if kind == "string" else column
    elif kind != "dictionary":
        column = raw.cast(pa.large_binary()) if "large" in kind else raw
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    problem = refused("parquet", tmp_path / "a.parquet")
    assert problem.where == f"{tmp_path / 'a.parquet'}, row 2"
    assert "not UTF-8: byte 0xe9 at offset 3" in problem.what


def test_of_a_dictionary_only_what_the_rows_use_is_decoded(monkeypatch):
    class Dictionary:
        """A column that says which of its values were taken."""

        type = pa.dictionary(pa.int32(), pa.string())
        indices = pa.array([7, None, 2, 7], pa.int32())
        dictionary = pa.array(SENTENCES)

    taken = []
    real = columns._texts
    monkeypatch.setattr(columns, "_texts", lambda column: taken.append(len(column)) or real(column))
    assert list(real(Dictionary)) == [SENTENCES[7], None, SENTENCES[2], SENTENCES[7]]
    assert taken == [2]
    for index in (-1, len(SENTENCES)):
        column = pa.DictionaryArray.from_arrays(pa.array([0, index], pa.int32()), pa.array(SENTENCES), safe=False)
        with pytest.raises(IndexError, match="out of bounds"):
            list(real(column))


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2]),
        pa.array([["a"], ["b"]]),
        pa.array([{"text": "a"}, {"text": "b"}]),
        pa.array([1, 2]).dictionary_encode(),
        pa.nulls(2),
    ],
    ids=lambda column: str(column.type),
)
def test_other_columns_are_refused_by_type(tmp_path, column):
    pyarrow.parquet.write_table(pa.table({"text": column, "body": ["a", "b"]}), tmp_path / "a.parquet")
    problem = refused("parquet", tmp_path / "a.parquet")
    assert "the column `text` is of type" in problem.what
    assert "training.dataset_text_field" in str(problem.fix)
    assert "body" in str(problem.fix)


def test_a_field_that_is_not_there_comes_with_those_that_are_and_the_key(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"content": "good words", "url": 1}\n')
    pyarrow.parquet.write_table(pa.table({"content": SENTENCES, "url": SENTENCES}), tmp_path / "a.parquet")
    for kind in ("jsonl", "parquet"):
        problem = refused(kind, tmp_path)
        assert "content" in problem.what
        assert "url" in problem.what
        assert "training.dataset_text_field" in str(problem.fix)
        assert "perhaps content" in str(problem.fix)
        assert texts(kind, tmp_path, "content")
    assert texts("jsonl", tmp_path, "content") == ["good words"]
    default, other = (open_source(TextKeys("jsonl", str(tmp_path), field=name)) for name in ("text", "content"))
    assert default.fingerprint != other.fingerprint


# --- JSON lines -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [b"9" * 5000, b"-" + b"1" * 200_000, b"NaN", b"-Infinity", b"1e999", b"[" * 400 + b"]" * 400, b'"\\ud800"']
)
def test_what_stands_in_other_fields_does_not_matter(tmp_path, value):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b'{"id": ' + value + b', "text": "after it"}\n' + GOOD)
    assert texts("jsonl", tmp_path)[1] == "after it"


@pytest.mark.parametrize(
    "line", [b"[" * 200_000, b'{"text":' * 200_000, b'{"id": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"]
)
def test_deep_nesting_is_reported_with_its_line(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(GOOD + line + b"\n")
    problem = refused("jsonl", tmp_path)
    assert problem.where.endswith("a.jsonl, line 2")
    assert "nested too deeply" in problem.what


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_long_line_is_reported_with_the_limit_at_a_bounded_cost(tmp_path, name, monkeypatch):
    monkeypatch.setattr(limits, "DOCUMENT_BYTES", 1 << 22)
    with gzip.open(tmp_path / name, "wb", 1) if name.endswith("gz") else open(tmp_path / name, "wb") as file:
        file.write(GOOD + b'{"text": "')
        for _ in range(100):
            file.write(b"x" * (1 << 20))
        file.write(b'"}\n' + GOOD)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem = refused("jsonl", tmp_path)
    assert problem.where.endswith(f"{name}, line 2")
    assert f"{1 << 22:,} bytes" in problem.what
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB
    source = open_source(TextKeys("jsonl", str(tmp_path)))
    lines = [record.data for shard in range(source.shards) for record in source.read(shard)]
    assert lines == [GOOD, None, GOOD]


def test_a_file_without_line_ends_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "DOCUMENT_BYTES", 1 << 10)
    monkeypatch.setattr(limits, "LINE_SKIPPED_BYTES", 1 << 22)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\0" * (1 << 24)))
    assert "has no end within 4,194,304 bytes" in refused("jsonl", tmp_path, on_bad_record="skip").what
    monkeypatch.setattr(limits, "BLANK_LINES", 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD + b"\n" * 5000))
    assert "more than 1,000 empty lines" in refused("jsonl", tmp_path).what


# --- files that are something else ----------------------------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
TWICE = "".join(f"line {i} of plain text\n" for i in range(50))
OTHERS = {
    "lfs": (POINTER, "pointer of Git LFS", "git lfs pull"),
    "gzip": (gzip.compress(GOOD * 9), "compressed by gzip", "rename it to"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(range(200)), "compressed by zstd", "rename it to"),
    "bzip2": (__import__("bz2").compress(GOOD * 9), "compressed by bzip2", "bunzip2"),
    "xz": (__import__("lzma").compress(GOOD * 9), "compressed by xz", "unxz"),
    "zip": (b"PK\x03\x04" + bytes(range(200)), "zip archive", "unpack"),
    "utf-16": (TWICE.encode("utf-16"), "UTF-16", "iconv"),
    "utf-16le": (TWICE.encode("utf-16-le"), "UTF-16LE", "iconv -f UTF-16LE"),
    "utf-16be": (TWICE.encode("utf-16-be"), "UTF-16BE", "iconv -f UTF-16BE"),
}


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("suffix", ["jsonl", "txt", "parquet"])
@pytest.mark.parametrize("other", OTHERS)
def test_a_file_of_another_kind_is_reported_as_what_it_is(tmp_path, other, suffix, mode):
    content, what, fix = OTHERS[other]
    (tmp_path / f"a.{suffix}").write_bytes(content)
    problem = refused({"txt": "text"}.get(suffix, suffix), tmp_path, on_bad_record=mode)
    assert problem.where == str(tmp_path / f"a.{suffix}")
    assert what in problem.what
    unpacked = {"gzip": "gunzip", "zstd": "zstd -d"}  # Parquet files are not read compressed
    assert (unpacked.get(other, fix) if suffix == "parquet" else fix) in str(problem.fix)


@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_pointer_under_a_compressed_name_is_reported_too(tmp_path, kind):
    (tmp_path / {"jsonl": "a.jsonl.gz", "text": "a.txt.gz"}[kind]).write_bytes(POINTER)
    assert "pointer of Git LFS" in refused(kind, tmp_path).what


def test_what_save_to_disk_leaves_is_reported_with_the_way_to_read_it(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": SENTENCES}).save_to_disk(str(tmp_path / "saved"))
    for kind in ("jsonl", "parquet", "text"):
        problem = refused(kind, tmp_path / "saved")
        assert "save_to_disk" in problem.what
        assert problem.fix == "set the dataset to arrow"
    assert texts("arrow", tmp_path / "saved") == SENTENCES
    info = tmp_path / "saved" / "dataset_info.json"
    assert "describes a data set" in refused("jsonl", info).what
    (tmp_path / "b.jsonl").write_bytes(GOOD)
    info.rename(tmp_path / "dataset_info.json")
    assert "dataset_info.json" in refused("jsonl", tmp_path / "*.json*").where


def test_a_json_document_of_several_lines_comes_with_the_way_to_json_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x"}], indent=1))
    with pytest.raises(UserError) as caught:
        build("jsonl", tmp_path)
    assert "jq -c" in str(caught.value.problems[0].fix)


# --- folders --------------------------------------------------------------------------------------------------------


def names(kind: str, path: Path | str) -> list[str]:
    return [file.name for file in open_source(TextKeys(kind, str(path))).files]


@pytest.mark.parametrize("pattern", ["", "**/*.jsonl"])
def test_linked_folders_are_read_once_and_cycles_end(tmp_path, caplog, pattern):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    (data / "own").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    for path in (data / "own/a.jsonl", elsewhere / "b.jsonl", elsewhere / "deep/c.jsonl", tmp_path / "no.jsonl"):
        path.write_bytes(GOOD)
    (data / "linked").symlink_to("../elsewhere")
    (data / "again").symlink_to(elsewhere)
    (data / "own/up").symlink_to("..")
    (data / "own/out").symlink_to("../..")
    (elsewhere / "deep/back").symlink_to(data)
    with caplog.at_level(logging.WARNING, logger="quadriga"):
        assert names("jsonl", f"{data}/{pattern}") == ["again/b.jsonl", "again/deep/c.jsonl", "own/a.jsonl"]
    assert pattern or "linked" in caplog.text


def test_a_copy_beside_its_compressed_form_is_noticed(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(GOOD))
    (tmp_path / "b.jsonl.xz").write_bytes(b"x")
    with caplog.at_level(logging.WARNING, logger="quadriga"):
        assert names("jsonl", tmp_path) == ["a.jsonl", "a.jsonl.gz"]
    assert "a.jsonl and a.jsonl.gz are both read" in caplog.text
    assert "1 files with a compression that is not supported" in caplog.text
    assert "b.jsonl.xz" in caplog.text


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
@pytest.mark.parametrize("what", ["a FIFO", "a socket", "a link that leads nowhere", "a device"])
def test_entries_that_are_no_files_are_reported(tmp_path, kind, what):
    suffix = {"text": "txt"}.get(kind, kind)
    (tmp_path / f"a.{suffix}").write_bytes(GOOD)
    odd = tmp_path / f"odd.{suffix}"
    if what == "a FIFO":
        os.mkfifo(odd)
    elif what == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(odd))
    else:
        odd.symlink_to("/dev/zero" if what == "a device" else "nowhere")
    for path in (tmp_path, odd) if what != "a link that leads nowhere" else (tmp_path,):
        problem = refused(kind, path)
        assert problem.where == str(odd)
        assert what in problem.what


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is closed to root")
def test_files_and_folders_that_may_not_be_read_are_reported(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    path.chmod(0)
    assert "Permission denied" in refused("jsonl", tmp_path).what
    (tmp_path / "inner").mkdir(mode=0)
    assert "the folder cannot be read: Permission denied" in refused("jsonl", tmp_path).what
    (tmp_path / "inner").chmod(0o700)


@pytest.mark.parametrize("kind", ["jsonl", "text", "parquet"])
def test_a_file_that_goes_away_is_reported(tmp_path, kind):
    path = tmp_path / f"a.{ {'text': 'txt'}.get(kind, kind) }"
    if kind == "parquet":
        pyarrow.parquet.write_table(pa.table({"text": SENTENCES}), path)
    else:
        path.write_bytes(GOOD * 10)
    source = open_source(TextKeys(kind, str(path)))
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        list(source.read(0))


def test_names_of_any_bytes_are_read_and_shown_escaped(tmp_path):
    for name in (b"\x1b[31mred\n.jsonl", b"\xff\xfe.jsonl"):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(b"[]\n")
    with pytest.raises(UserError) as caught:
        build("jsonl", tmp_path)
    assert len(caught.value.problems) == 2
    assert all(c.isprintable() or c == "\n" for c in caught.value.report)
