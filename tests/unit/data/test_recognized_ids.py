"""Files of token ids that are named as text, JSON lines or Parquet are refused by what they are."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from quadriga.config.schema import TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.recognize import foreign_to_ids
from quadriga.data.sources import BadRecord
from quadriga.errors import UserError

RNG = np.random.default_rng(3)
# Frequencies of ids fall as 1 / rank, as those of real tokenizers do; the smallest ids are single bytes.
RANKS = np.minimum((50_000 ** RNG.random(20_000)).astype("i8") + 10, 50_256)
LLMC = np.zeros(256, "<i4")
LLMC[:3] = 20240520, 1, 4
FILES = {
    "uint16": (RANKS.astype("<u2").tobytes(), "looks like uint16 token ids"),
    "uint32": ((RANKS * 2).astype("<u4").tobytes(), "looks like uint32 or int32 token ids"),
    "int64": (RANKS.astype("<i8").tobytes(), "looks like int64 token ids"),
    "characters": ((RANKS % 65).astype("<u2").tobytes(), "looks like uint16 token ids"),
    "bytes": ((RANKS % 258).astype("<u2").tobytes(), "looks like uint16 token ids"),
    "zeros": (bytes(10_000), "begins with NUL bytes alone"),
    "no small ids": (np.maximum(RANKS, 300).astype("<u2").tobytes(), "not text"),
    "megatron index": (b"MMIDIDX\x00\x00" + struct.pack("<QBqq", 1, 8, 0, 1) + bytes(8), "an index of Megatron"),
    "old index": (b"TNTIDX\x00\x00" + bytes(100), "older format (TNTIDX)"),
    "llm.c": (LLMC.tobytes() + bytes(8), "a file of uint16 token ids of llm.c"),
    "numpy": (b"\x93NUMPY\x01\x00" + bytes(100), "a NumPy file"),
}


def problem_of(kind: str, path) -> str:
    with pytest.raises(UserError) as caught:  # noqa: PT012 (a file is refused when it is opened, or when it is read)
        source = open_source(TextKeys(kind, str(path)))
        for shard in range(source.shards):
            for record in source.read(shard):
                source.parse(record)
    assert not isinstance(caught.value, BadRecord)  # which could be skipped
    return str(caught.value.problems[0])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_ids_are_not_read_as_text(tmp_path, name, kind):
    content, what = FILES[name]
    path = tmp_path / f"a.{ {'text': 'txt'}.get(kind, kind) }"
    path.write_bytes(content)
    report = problem_of(kind, path)
    assert what in report
    assert "tokens" in report or name == "old index"


TEXTS = {
    "latin": "Füße und Straßen, déjà vu.\n" * 200,
    "chinese": "漢字" * 2000,
    "emoji": "\U0001f600" * 2000,
    "terminal": "\x1b[1mbold\x1b[0m\tand\fmore\r\n" * 100,
    "one NUL": "words and a \0 NUL\n" + "words without\n" * 500,
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_is_still_text(tmp_path, name):
    (tmp_path / "a.txt").write_text(TEXTS[name], newline="")
    source = open_source(TextKeys("text", str(tmp_path)))
    read = [source.parse(record).text for shard in range(source.shards) for record in source.read(shard)]
    assert "".join(read) == TEXTS[name]


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16"])
def test_other_encodings_keep_their_remedy(tmp_path, name, encoding):
    if encoding == "utf-16" or name == "latin":  # without a mark, only Latin text is recognized
        (tmp_path / "a.txt").write_bytes(TEXTS[name].encode(encoding))
        assert "iconv -f UTF-16" in problem_of("text", tmp_path / "a.txt")


def test_token_ids_are_rarely_taken_for_something_else():
    for content, _ in list(FILES.values())[:5]:
        assert all(foreign_to_ids(content[start:]) is None for start in range(0, 4000, 8))
