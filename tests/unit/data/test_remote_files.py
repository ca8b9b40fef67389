"""Text at URLs of fsspec, and what is repeated if a read fails."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import uuid

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import zstd_frames

from quadriga.cli.main import main
from quadriga.config.schema import TextKeys
from quadriga.data import byte_files, stored_arrays
from quadriga.data.catalogue import open_source
from quadriga.data.sources import BadRecord
from quadriga.errors import UserError

TEXTS = [f"text {i} 漢字 " + "word " * (i % 40) for i in range(400)]


def lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A folder in fsspec's memory, by its URL, and a function that writes a file into it."""
    monkeypatch.setattr(stored_arrays, "PAUSES", (0, 0, 0))
    system, root = fsspec.filesystem("memory"), f"/{uuid.uuid4().hex}"
    yield f"memory://{root}", lambda name, content: system.pipe(f"{root}/{name}", content)
    system.rm(root, recursive=True)


def read(keys, streams=3):
    source = open_source(keys, streams=streams)
    return [source.parse(record).text for shard in range(source.shards) for record in source.read(shard)]


def test_each_format_is_read_from_urls(store, tmp_path):
    url, put = store
    put("a/1.jsonl", lines(TEXTS[:100]))
    put("a/2.jsonl.zst", zstd_frames(lines(TEXTS[100:200])))
    put("a/deep/3.jsonl", lines(TEXTS[200:]))
    put("a/.hidden.jsonl", lines(["hidden"]))
    assert read(TextKeys("jsonl", f"{url}/a")) == TEXTS
    assert read(TextKeys("jsonl", f"{url}/a/*.zst")) == TEXTS[100:200]
    assert read(TextKeys("jsonl", f"{url}/a/1.jsonl")) == TEXTS[:100]
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "t.parquet", row_group_size=50)
    put("t.parquet", (tmp_path / "t.parquet").read_bytes())
    assert read(TextKeys("parquet", f"{url}/t.parquet")) == TEXTS
    put("t.txt", "\n".join(TEXTS).encode())
    assert "".join(read(TextKeys("text", f"{url}/t.txt"))) == "\n".join(TEXTS)
    assert read(TextKeys("parquet", f"file://{tmp_path}/t.parquet")) == TEXTS


def test_the_fingerprint_has_names_sizes_and_what_the_store_says_of_the_content(store, tmp_path, monkeypatch):
    url, put = store
    put("a/1.jsonl", lines(TEXTS))
    put("b/1.jsonl", lines(TEXTS))
    (tmp_path / "1.jsonl").write_bytes(lines(TEXTS))
    remote, other, local = (open_source(TextKeys("jsonl", each)) for each in (f"{url}/a", f"{url}/b", str(tmp_path)))
    assert remote.fingerprint == other.fingerprint == local.fingerprint
    assert remote.files[0].modified > 0
    assert (remote.files[0].url, remote.files[0].name) == (
        f"{url}/a/1.jsonl",
        "1.jsonl",
    )
    real = fsspec.implementations.memory.MemoryFileSystem.find
    tags = itertools.count()

    def find(self, path, **options):
        tag = str(next(tags))
        return {name: facts | {"ETag": tag} for name, facts in real(self, path, **options).items()}

    with monkeypatch.context() as patch:
        patch.setattr(fsspec.implementations.memory.MemoryFileSystem, "find", find)
        one, two = (open_source(TextKeys("jsonl", f"{url}/a")).fingerprint for _ in range(2))
    assert len({remote.fingerprint, one, two}) == 3


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_failed_read_is_repeated_and_then_stops_the_run(store, tmp_path, monkeypatch, caplog, name):
    url, put = store
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet")
    put(name, lines(TEXTS) if name == "a.jsonl" else (tmp_path / name).read_bytes())
    keys, fails = TextKeys(name[2:], f"{url}/{name}"), [0]
    real = byte_files.read_remote

    def fail(*given):
        if fails[0]:
            fails[0] -= 1
            raise OSError(errno.EIO, "SlowDown: please reduce your request rate")
        return real(*given)

    monkeypatch.setattr(byte_files, "read_remote", fail)
    source = open_source(keys)
    fails[0] = 3
    with caplog.at_level(logging.WARNING, logger="quadriga"):
        assert [source.parse(record).text for record in source.read(0)] == TEXTS
    assert caplog.text.count("trying again") == 2
    fails[0] = 99
    with pytest.raises(UserError, match="cannot be read: SlowDown") as caught:
        list(source.read(0))
    assert not isinstance(caught.value, BadRecord)
    assert f"{url}/{name}" in caught.value.problems[0].where


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt.zst", "a.parquet"])
def test_failed_reads_of_local_files_are_repeated_too(tmp_path, monkeypatch, caplog, name):
    monkeypatch.setattr(stored_arrays, "PAUSES", (0, 0, 0))
    content = {"a.jsonl": lines(TEXTS), "a.txt.zst": zstd_frames("\n".join(TEXTS).encode())}
    if name in content:
        (tmp_path / name).write_bytes(content[name])
    else:
        pq.write_table(pa.table({"text": TEXTS}), tmp_path / name)
    source = open_source(TextKeys({"a.txt.zst": "text"}.get(name, name[2:]), str(tmp_path / name)))
    expected = [source.parse(record).text for record in source.read(0)]
    real, fails = byte_files.opened, [3]

    def opened(*given, **options):
        if fails[0]:
            fails[0] -= 1
            error = UserError()
            error.__cause__ = OSError(errno.EIO, "Input/output error")
            raise error
        return real(*given, **options)

    monkeypatch.setattr(byte_files, "opened", opened)
    assert [source.parse(record).text for record in source.read(0)] == expected
    assert caplog.text.count("Input/output error); trying again") == 2
    fails[0] = 99
    with pytest.raises(UserError, match="cannot be read: Input/output error"):
        list(source.read(0))


def test_a_file_that_changed_size_is_refused(store):
    url, put = store
    put("a.jsonl", lines(TEXTS))
    source = open_source(TextKeys("jsonl", f"{url}/a.jsonl"))
    put("a.jsonl", lines([*TEXTS, "more"]))
    with pytest.raises(UserError, match="the file was changed"):
        list(source.read(0))


@pytest.mark.parametrize(
    ("dataset", "path", "what", "fix"),
    [
        ("jsonl", "URL/none.jsonl", "cannot be read", ""),
        ("jsonl", "URL/*.csv", "nothing there is read as jsonl", ""),
        ("jsonl", "s3://bucket/a.jsonl", "cannot be reached", "pip install s3fs"),
        ("jsonl", "nothing://bucket/a.jsonl", "cannot be reached", "protocol of fsspec"),
        ("tokens", "s3://bucket/ids.bin", "not read from a URL", "quadriga data fetch s3://bucket/ids.bin DIR"),
        ("arrow", "s3://bucket/a", "not read from a URL", "quadriga data fetch s3://bucket/a DIR"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_remedy(store, dataset, path, what, fix):
    url, put = store
    put("a.jsonl", lines(TEXTS))
    with pytest.raises(UserError, match=what) as caught:
        open_source(TextKeys(dataset, path.replace("URL", url)))
    assert "training.dataset_path" in caught.value.problems[0].where
    assert fix in str(caught.value.problems[0].fix)


def test_commands_read_urls(store, capsys):
    url, put = store
    put("a.jsonl", lines(TEXTS))
    assert main(["data", f"{url}/a.jsonl", "--rows", "1"]) == 0
    assert "documents    400" in capsys.readouterr().out
