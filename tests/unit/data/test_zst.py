"""Text and JSON lines compressed by zstd. Frames are also written here by RFC 8878, without a library."""

from __future__ import annotations

import gzip
import json
import logging
import struct

import pyarrow
import pytest
from corpora import zstd_frames

from quadriga.config.schema import TextKeys
from quadriga.data import sources
from quadriga.data.catalogue import open_source
from quadriga.errors import UserError

MAGIC = b"\x28\xb5\x2f\xfd"
LINES = [json.dumps({"text": f"line {i} 漢字 " + "word " * (i % 50)}) for i in range(500)]
CONTENT = "".join(line + "\n" for line in LINES).encode()


def raw_frame(data: bytes) -> bytes:
    """One frame of blocks that are not compressed, with its content's size."""
    blocks = [data[at : at + 100_000] for at in range(0, len(data), 100_000)] or [b""]
    header = MAGIC + b"\xa0" + struct.pack("<I", len(data))
    last = len(blocks) - 1
    return header + b"".join(
        ((len(block) << 3) | (number == last)).to_bytes(3, "little") + block for number, block in enumerate(blocks)
    )


def skippable(size: int) -> bytes:
    return b"\x50\x2a\x4d\x18" + struct.pack("<I", size) + bytes(size)


def documents(path, kind="jsonl") -> list[str]:
    source = open_source(TextKeys(kind, str(path)))
    return [source.parse(record).text for shard in range(source.shards) for record in source.read(shard)]


@pytest.mark.parametrize(
    "packed",
    [
        raw_frame(CONTENT),
        raw_frame(CONTENT[:777]) + raw_frame(CONTENT[777:]),
        raw_frame(CONTENT[:777]) + skippable(99) + raw_frame(b"") + raw_frame(CONTENT[777:]),
        pyarrow.compress(CONTENT, codec="zstd", asbytes=True),
        zstd_frames(CONTENT),
    ],
)
def test_frames_are_read_one_after_another(tmp_path, packed):
    path = tmp_path / "a.json.zst"
    path.write_bytes(packed)
    assert documents(path) == [json.loads(line)["text"] for line in LINES]
    (tmp_path / "b.TXT.ZST").write_bytes(packed)
    assert "".join(documents(tmp_path / "b.TXT.ZST", "text")).encode() == CONTENT
    assert documents(tmp_path) == documents(path)


def test_c4_shards_can_be_zst(tmp_path):
    (tmp_path / "c4-train.00000-of-00001.json.zst").write_bytes(zstd_frames(CONTENT))
    (tmp_path / "c4-validation.00000-of-00001.json.gz").write_bytes(gzip.compress(b'{"text": "held out"}\n'))
    assert len(documents(tmp_path, "c4")) == len(LINES)
    assert documents(tmp_path, "c4_validation") == ["held out"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (zstd_frames(CONTENT)[:-20], "the compressed file is truncated"),
        (raw_frame(CONTENT)[:5000], "the compressed file is truncated"),
        (raw_frame(CONTENT) + b"no frame", "the compressed file is damaged"),
        (b"no frame at all" * 9, "the compressed file is damaged"),
        (MAGIC + b"\x04\xf0" + bytes(30), "the compressed file is damaged"),  # a window of 2^41 bytes
        (gzip.compress(CONTENT), "compressed by gzip, and its name does not end in .gz"),
        (b"PAR1" * 99, "the file is a Parquet file"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.txt.zst"])
def test_a_damaged_file_is_named(tmp_path, name, content, what):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        documents(path, "text" if "txt" in name else "jsonl")
    (problem,) = caught.value.problems
    assert what in problem.what
    assert str(path) in problem.where


def test_a_line_is_bounded_however_small_the_file_is(tmp_path, monkeypatch):
    monkeypatch.setattr("quadriga.limits.LINE_SKIPPED_BYTES", 1 << 22)
    monkeypatch.setattr("quadriga.limits.DOCUMENT_BYTES", 1 << 20)
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(pyarrow.compress(b" " * (1 << 24), codec="zstd", asbytes=True))
    assert path.stat().st_size < 1 << 14
    with pytest.raises(UserError, match="has no end within"):
        documents(path)


def test_it_needs_pyarrow(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd_frames(CONTENT))
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="a file compressed by zstd needs pyarrow, which is not installed"):
        documents(path)


def test_copies_are_noticed_and_tokens_are_not_read_from_it(tmp_path, caplog):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(CONTENT))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd_frames(CONTENT))
    with caplog.at_level(logging.WARNING, logger="quadriga"):
        open_source(TextKeys("jsonl", str(tmp_path)))
    assert "a.jsonl.gz and a.jsonl.zst are both read" in caplog.text
