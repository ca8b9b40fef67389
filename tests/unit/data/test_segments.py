"""Cutting files anywhere: whatever is in them and wherever the cuts fall, the pieces are the file."""

from __future__ import annotations

import gzip
import json
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quadriga.config.schema import TextKeys
from quadriga.data import jsonl, text
from quadriga.data.catalogue import open_source

TEXT = st.text(alphabet=st.sampled_from("ab \n漢é"), min_size=1, max_size=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("segments")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@settings(max_examples=80)
@given(content=TEXT, segment=st.integers(5, 60), look_ahead=st.integers(4, 80))
@example(content="漢" * 40, segment=7, look_ahead=4)
@example(content="a\n" * 40, segment=8, look_ahead=5)
def test_segments_of_a_text_are_the_text(folder, name, content, segment, look_ahead):
    data = content.encode()
    (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    sizes = {"LEAST_SEGMENT": segment, "MOST_SEGMENT": segment, "LOOK_AHEAD": look_ahead}
    with patch.multiple(text, **sizes):
        source = open_source(TextKeys("text", str(folder / name)))
        segments = [source.parse(record) for shard in range(source.shards) for record in source.read(shard)]
    assert "".join(each.text for each in segments) == content
    assert [each.begins for each in segments] == [True] + [False] * (len(segments) - 1)
    assert [each.ends for each in segments] == [False] * (len(segments) - 1) + [True]
    assert all(each.text for each in segments)


def test_segments_end_at_line_ends_where_lines_are_short(folder):
    (folder / "b.txt").write_text("a line of text\n" * 20_000)
    source = open_source(TextKeys("text", str(folder / "b.txt")), streams=8)
    assert source.shards >= 32
    assert all(str(record.data, "utf-8").endswith("\n") for i in range(source.shards) for record in source.read(i))


@settings(max_examples=60)
@given(documents=st.lists(st.text(max_size=60), min_size=1, max_size=20), size=st.integers(1, 90), blank=st.booleans())
def test_ranges_of_json_lines_own_every_line_once(folder, documents, size, blank):
    end = "\n\n" if blank else "\n"
    lines = end.join(json.dumps({"text": document}) for document in documents)
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    with patch.multiple(jsonl, LEAST_RANGE=size, MOST_RANGE=size):
        source = open_source(TextKeys("jsonl", str(folder / "a.jsonl")))
        seen = [source.parse(record).text for shard in range(source.shards) for record in source.read(shard)]
    assert seen == documents
