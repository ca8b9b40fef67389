"""What is wrong with the data is said before the first step, with the file and the line, and what to do."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from corpora import write_jsonl, zstd_frames

from quadriga.config.schema import Dataloader, TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.files import File
from quadriga.data.stream_loader import build_loader
from quadriga.data.survey import MOST_PROBLEMS
from quadriga.data.text import TextSource
from quadriga.data.tokenizer import ByteTokenizer
from quadriga.errors import UserError

GOOD = b'{"text": "a good line, long enough for a window"}\n'


def build(dataset: str, path: Path | str | None, *, seq_len: int = 16, infinite: bool = True):
    return build_loader(
        TextKeys(dataset, None if path is None else str(path)),
        ByteTokenizer(),
        seed=1,
        seq_len=seq_len,
        global_batch_size=4,
        rows=range(4),
        dataloader=Dataloader(),
        infinite=infinite,
    )


@pytest.mark.parametrize("infinite", [True, False])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"txt": "x", "url": 1}', r"no `text`; its keys are 'txt', 'url'"),
        (b'{"text": null}', "`text` is a JSON null, not a string"),
        (b'{"text": 12}', "`text` is a JSON number"),
        (b'["text"]', "a JSON array, not an object"),
        (b'{"text": "cut o', "not JSON"),
        (b'{"text": "caf\xe9"}', "byte 0xe9 is not UTF-8"),
        (b'{"text": "\\ud800 alone"}', "surrogate"),
    ],
)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.json.gz"])
def test_a_bad_json_line_is_named(tmp_path, name, line, message, infinite):
    content = GOOD * 5 + b"\n" + line + b"\n" + GOOD
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(UserError, match=message) as caught:
        build("jsonl", tmp_path, infinite=infinite)
    assert caught.value.problems[0].where == f"{path}, line 7"
    assert len(caught.value.problems) == 1


def test_all_bad_lines_are_named_at_once_up_to_a_limit(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{}\n" + GOOD + b"[]\n")
    (tmp_path / "b.jsonl").write_bytes(b"no\n")
    with pytest.raises(UserError) as caught:
        build("jsonl", tmp_path)
    assert [problem.where.rsplit("/", 1)[-1] for problem in caught.value.problems] == [
        "a.jsonl, line 2",
        "a.jsonl, line 4",
        "b.jsonl, line 1",
    ]
    (tmp_path / "c.jsonl").write_bytes(b"no\n" * 1000)
    with pytest.raises(UserError) as caught:
        build("jsonl", tmp_path)
    assert len(caught.value.problems) == MOST_PROBLEMS


@pytest.mark.parametrize("packed", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "text"])
def test_a_truncated_file_names_the_last_whole_line(tmp_path, kind, packed):
    lines = [json.dumps({"text": f"line {i} " + "word " * (i % 50)}) for i in range(4000)]
    content = "".join(line + "\n" for line in lines).encode()
    whole = gzip.compress(content) if packed == "gz" else zstd_frames(content, 1 << 12)
    path = tmp_path / f"cut.{'txt' if kind == 'text' else kind}.{packed}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truncated") as caught:
        build(kind, path)
    named = int(caught.value.problems[0].where.rpartition("line ")[2])
    assert 500 < named < 4000
    path.write_bytes(b"not compressed at all" * 10)
    with pytest.raises(UserError, match="damaged"):
        build(kind, path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2 : len(whole) // 2 + 20] = b"\0" * 20
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"damaged|UTF-8|JSON"):
        build(kind, path)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_that_is_not_utf8_is_named(tmp_path, name):
    content = ("ein Satz\n" * 20000).encode() + "größer\n".encode("latin-1") + b"rest\n" * 9000
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match="iconv") as caught:
        build("text", tmp_path)
    assert caught.value.problems[0].where == f"{tmp_path / name}, line 20001"


def test_missing_empty_and_unreadable_paths(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "a.jsonl.xz").write_bytes(b"x")
    for dataset, path, message in [
        ("text", tmp_path / "gone", "no such file or folder"),
        ("text", tmp_path / "*.csv", "no file matches"),
        ("jsonl", empty, "has no jsonl file; it contains nothing"),
        ("parquet", tmp_path, "has no parquet file; it contains"),
        ("text", tmp_path / "nothing.txt", "every file is empty"),
        ("jsonl", tmp_path / "a.jsonl.xz", r"\.xz files cannot be read"),
        ("jsonl", None, "no path is given"),
        ("builtin", tmp_path, "has no path"),
        ("jsnl", tmp_path, "did you mean: jsonl"),
        ("c4", tmp_path / "gone", "no such file or folder"),
        ("c4", empty, "no C4 shard of the train split"),
    ]:
        with pytest.raises(UserError, match=message):
            build(dataset, path)


def test_c4_folders_are_distinguished_by_split(tmp_path):
    english = tmp_path / "en"
    english.mkdir()
    write_jsonl(english / "c4-train.00000-of-01024.json.gz", ["train " * 40])
    with pytest.raises(UserError, match="validation split"):
        open_source(TextKeys("c4_validation", str(tmp_path)))
    write_jsonl(english / "c4-validation.00000-of-00008.json.gz", ["held out " * 40])
    for dataset, name in (("c4", "train "), ("c4_validation", "held out ")):
        source = open_source(TextKeys(dataset, str(tmp_path)))
        assert [source.parse(record).text for record in source.read(0)] == [name * 40]
        assert source.shards == 1


def test_too_little_data_for_a_window(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 97)
    build("text", tmp_path, seq_len=98).close()
    with pytest.raises(UserError, match="99 tokens, fewer than the 100 of one window"):
        build("text", tmp_path, seq_len=99)
    loader = build("text", tmp_path, seq_len=99, infinite=False)
    assert sum(int((batch.labels >= 0).sum()) for batch in loader) == 98
    loader.close()


def test_parquet_of_the_wrong_shape(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    for table, message in [
        ({"body": ["x"]}, "no column `text`; its columns are body"),
        ({"text": [1, 2]}, "the column `text` is of type int64"),
        ({"text": ["good " * 9, None, "good"]}, r"a\.parquet, row 2"),
    ]:
        pyarrow.parquet.write_table(pyarrow.table(table), path)
        with pytest.raises(UserError, match=message):
            build("parquet", path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        build("parquet", path)


def test_large_data_are_sampled_first_and_read_when_they_are_reached(tmp_path, monkeypatch):
    monkeypatch.setattr("quadriga.data.survey.WHOLE_BYTES", 1 << 16)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD * 9000 + b"{}\n")
    build("jsonl", path).close()
    path.write_bytes(GOOD * 3 + b"{}\n" + GOOD * 9000)
    with pytest.raises(UserError, match="line 4"):
        build("jsonl", path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD)
    source = open_source(TextKeys("jsonl", str(tmp_path)))
    assert [source.parse(record).text for record in source.read(0)] == ["a good line, long enough for a window"]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT.GZ", "a.txt.Gz"])
def test_a_byte_order_mark_is_no_text_of_a_text_file(tmp_path, name):
    content = b"\xef\xbb\xbfone\n\xef\xbb\xbftwo"
    (tmp_path / name).write_bytes(content if name == "a.txt" else gzip.compress(content))
    source = open_source(TextKeys("text", str(tmp_path)))
    assert [source.parse(record).text for record in source.read(0)] == ["one\n\ufefftwo"]


def test_two_columns_of_one_name_are_to_be_renamed(tmp_path):
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="2 columns `text`") as caught:
        build("parquet", tmp_path)
    assert caught.value.problems[0].fix == "rename all but one of them"


def test_hidden_files_and_other_suffixes_of_a_folder_are_left_out(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in (".cache/x.txt", ".hidden.txt", "b.csv", "sub.txt"):
        (tmp_path / name).write_text(name)
    source = open_source(TextKeys("text", str(tmp_path)))
    assert isinstance(source, TextSource)
    assert source.files == (File(tmp_path / "sub.txt", "sub.txt", 7, compressed=False),)
