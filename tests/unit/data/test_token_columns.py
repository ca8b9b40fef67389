"""Columns of ids, as real packages write them: after columns of every type, in parts, with empty lists and slices."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_writers import lists, write_arrow, write_parquet

from quadriga.data.arrow_messages import node_and_buffer_counts
from quadriga.data.token_files import open_token_files
from quadriga.data.token_parquet import ParquetColumn
from quadriga.errors import UserError

DOCUMENTS = [[1, 2, 3], [], [4], [5, 6], [], [7, 8, 9, 10]]
IDS = [one for document in DOCUMENTS for one in document]
BEFORE = {  # columns of other types, of six rows
    "null": pa.nulls(6),
    "bool": pa.array([True, None] * 3),
    "string": pa.array(["a", "b", None] * 2),
    "large binary": pa.array([b"a"] * 6, pa.large_binary()),
    "dictionary": pa.array(["a", "b", "a"] * 2).dictionary_encode(),
    "list": pa.array([[1.5], None, []] * 2),
    "list of lists": pa.array([[["a"], []], None, []] * 2, pa.large_list(pa.list_(pa.string()))),
    "fixed list": pa.array([[1, 2]] * 6, pa.list_(pa.int8(), 2)),
    "struct": pa.array([{"a": 1, "b": [None, "x"]}] * 6),
    "map": pa.array([[("a", 1)], []] * 3, pa.map_(pa.string(), pa.int64())),
    "decimal": pa.array([1] * 6, pa.decimal128(9, 2)),
    "time": pa.array([0] * 6, pa.timestamp("us", "UTC")),
    "bytes": pa.array([b"abc"] * 6, pa.binary(3)),
    "half": pa.array(np.zeros(6, "f2")),
    "extension": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16] * 6, pa.binary(16))),
}


@pytest.mark.parametrize("before", [name for name in BEFORE if name != "null"])  # which has no buffer in files
def test_nodes_and_buffers_of_a_type_are_those_of_arrow(before):
    kind = BEFORE[before].type
    assert node_and_buffer_counts(kind)[1] == len([*pa.array([], kind).buffers()])


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("stream", [False, True])
def test_ids_are_found_after_columns_of_every_type(tmp_path, before, stream):
    table = pa.table({"before": BEFORE[before], "ids": pa.array(DOCUMENTS, pa.list_(pa.uint16()))})
    write_arrow(tmp_path / "a.arrow", table, rows=4, stream=stream)
    tokens = open_token_files(str(tmp_path), field="ids")
    assert tokens.read(0, 10).tolist() == IDS
    assert tokens.documents(0, 10) == ((0, 0), (0, 2), (0, 3), (0, 5))
    assert tokens.borders(1, 10).tolist() == [2, 3, 5, 9]


def test_a_type_that_cannot_be_skipped_is_named(tmp_path):
    table = pa.table({"before": pa.array(["a"] * 6, pa.string_view()), "ids": pa.array(DOCUMENTS)})
    write_arrow(tmp_path / "a.arrow", table)
    with pytest.raises(UserError, match="a column of type string_view before that of the data; write that first"):
        open_token_files(str(tmp_path))
    write_arrow(tmp_path / "a.arrow", table.select(["ids", "before"]))
    assert open_token_files(str(tmp_path)).read(0, 10).tolist() == IDS


@pytest.mark.parametrize("form", ["parquet", "arrow"])
@pytest.mark.parametrize("kind", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_every_type_of_integers_is_read(tmp_path, form, kind):
    inner = getattr(pa, kind)()
    tables = {
        "list": (lists(DOCUMENTS, pa.list_(inner)), 4),
        "large": (lists(DOCUMENTS, pa.large_list(inner)), 4),
        "fixed": (lists([IDS[:5], IDS[5:]], pa.list_(inner, 5)), 2),
        "plain": (pa.table({"input_ids": pa.array(IDS, inner)}), 0),
    }
    for name, (table, documents) in tables.items():
        path = tmp_path / f"{name}.{form}"
        {"parquet": write_parquet, "arrow": write_arrow}[form](path, table)
        tokens = open_token_files(str(path), token_dtype=kind)
        assert tokens.read(0, 10).tolist() == IDS
        assert len(tokens.documents(0, 10)) == documents
        assert not list(tokens.verify(11))


@pytest.mark.parametrize("before", BEFORE)
def test_ids_of_parquet_are_counted_after_columns_of_every_type(tmp_path, before):
    table = pa.table({"ids.of": BEFORE[before], "ids": pa.array(DOCUMENTS, pa.list_(pa.uint16()))})
    write_parquet(tmp_path / "a.parquet", table, rows=4)
    tokens = open_token_files(str(tmp_path), field="ids")
    assert tokens.read(0, 10).tolist() == IDS
    assert tokens.documents(0, 10) == ((0, 0), (0, 2), (0, 3), (0, 5))


@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_without_a_name_the_column_is_one_of_ids(tmp_path, form):
    def read(*names: str) -> list[int]:
        table = pa.table({name: pa.array([number, number]) for number, name in enumerate(names)})
        {"parquet": write_parquet, "arrow": write_arrow}[form](tmp_path / f"a.{form}", table)
        return open_token_files(str(tmp_path)).read(0, 2).tolist()

    assert read("length", "input_ids", "text") == [1, 1]
    assert read("length", "text") == [1, 1]
    assert read("ids") == [0, 0]
    with pytest.raises(UserError, match="no column `input_ids`"):
        read("length", "ids")


def test_bounds_that_do_not_begin_with_zero_are_followed(tmp_path):
    """A sliced list array, as an IPC writer may leave it."""
    array = pa.ListArray.from_arrays(pa.array([2, 3, 3, 6], pa.int32()), pa.array(range(9), pa.int32()))
    write_arrow(tmp_path / "a.arrow", pa.table({"ids": array[1:]}))
    write_arrow(tmp_path / "b.arrow", pa.table({"ids": array}))
    tokens = open_token_files(str(tmp_path))
    assert tokens.read(0, tokens.length).tolist() == [3, 4, 5, 2, 3, 4, 5]
    assert tokens.documents(0, 7) == ((0, 1), (1, 0), (1, 2))


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(st.lists(st.integers(0, 300), max_size=6), min_size=1, max_size=12),
    rows=st.integers(1, 5),
    version=st.sampled_from(["1.0", "2.0"]),
    dictionary=st.booleans(),
)
def test_empty_lists_of_parquet_are_counted_right(tmp_path_factory, documents, rows, version, dictionary):
    ids = [one for document in documents for one in document]
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    write_parquet(path, lists(documents), rows, data_page_version=version, use_dictionary=dictionary)
    if not ids:
        return
    tokens = open_token_files(str(path))
    assert tokens.read(0, tokens.length).tolist() == ids
    assert [row for _, row in tokens.documents(0, len(ids))] == [row for row, one in enumerate(documents) if one]


def test_what_the_library_datasets_writes_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"text": ["x"] * 6, "input_ids": DOCUMENTS, "attention_mask": [[1] * len(one) for one in DOCUMENTS]}
    data = datasets.Dataset.from_dict(rows)
    data.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    data.to_parquet(str(tmp_path / "a.parquet"))
    for path in (tmp_path / "saved", tmp_path / "a.parquet"):
        tokens = open_token_files(str(path), field="input_ids")
        assert tokens.read(0, tokens.length).tolist() == IDS
        assert len(tokens.documents(0, 10)) == 4


def test_threads_decode_one_row_group_at_a_time(tmp_path, monkeypatch):
    """So that memory does not grow with their number; and none decodes a group that another one has decoded."""
    ids = np.arange(4000) % 250
    pyarrow.parquet.write_table(pa.table({"input_ids": ids.astype("<u2")}), tmp_path / "a.parquet", row_group_size=1000)
    files, running, most, calls = open_token_files(str(tmp_path)), 0, 0, []
    real = ParquetColumn._read_group

    def read_group(self, part):
        nonlocal running, most
        calls.append(part)
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        try:
            return real(self, part)
        finally:
            running -= 1

    monkeypatch.setattr(ParquetColumn, "_read_group", read_group)
    with ThreadPoolExecutor(8) as pool:
        starts = [start for start in range(0, 4000, 500) for _ in range(4)]
        rows = list(pool.map(lambda start: files.read(start, start + 500), starts))
    assert all(np.array_equal(row, ids[start : start + 500]) for start, row in zip(starts, rows, strict=True))
    assert most == 1
    assert sorted(calls) == [0, 1, 2, 3]
