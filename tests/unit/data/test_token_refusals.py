"""Files that are not what they should be, and wrong ids: one message with the file and a remedy that works."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from token_writers import (
    lists,
    llmc_header,
    write_arrow,
    write_llmc,
    write_megatron,
    write_parquet,
    write_raw,
    write_shards,
)

from quadriga import limits
from quadriga.config import assets
from quadriga.data import sources, token_files
from quadriga.data.token_files import TOKEN_FORMATS, open_token_files
from quadriga.errors import Problem, UserError


def refused(path: Path | str, **options) -> Problem:
    """The one problem of opening these files."""
    with pytest.raises(UserError) as caught:
        open_token_files(str(path), **options).close()
    assert len(caught.value.problems) == 1
    return caught.value.problems[0]


def wrong(path: Path | str, vocab_size: int | None = 100, **options) -> list[Problem]:
    """What a verification finds."""
    return list(open_token_files(str(path), **options).verify(vocab_size))


# --- paths and options ----------------------------------------------------------------------------------------------


def test_paths_without_token_files_are_refused(tmp_path):
    assert refused(tmp_path / "none").what == "there is no such file or folder"
    (tmp_path / "notes.txt").write_text("x")
    assert "the folder has no token file; it contains notes.txt" in refused(tmp_path, key="validation").what
    assert refused(tmp_path, key="validation").where == "validation.dataset_path"


def test_values_that_do_not_exist_come_with_those_that_do(tmp_path):
    write_raw(tmp_path / "a.bin", range(5))
    problem = refused(tmp_path, token_dtype="unit16")
    assert problem.where == "training.token_dtype"
    assert problem.nearest == "uint16"
    problem = refused(tmp_path, token_format="megatrone")
    assert (problem.where, problem.nearest) == ("training.token_format", "megatron")
    assert problem.allowed == ", ".join(TOKEN_FORMATS)


def test_a_headerless_file_without_a_type_is_refused_with_the_list(tmp_path):
    for name in ("a.bin", "a.npy"):
        write_raw(tmp_path / name, range(300))
        problem = refused(tmp_path / name)
        assert "no header" in problem.what
        assert "uint16, uint32, int32, int64" in str(problem.allowed)
        assert "training.token_dtype" in str(problem.fix)


@pytest.mark.parametrize("wanted", TOKEN_FORMATS[1:])
@pytest.mark.parametrize("form", TOKEN_FORMATS[1:])
def test_a_wrong_format_is_refused_by_what_the_file_is(tmp_path, form, wanted):
    ids = list(range(1, 90))
    path = tmp_path / f"a.{form if form in ('npy', 'parquet', 'arrow') else 'bin'}"
    match form:
        case "quadriga":
            write_shards(tmp_path, [[ids]])
            path = tmp_path / "00000.bin"
        case "megatron":
            write_megatron(tmp_path / "a", [[ids]])
        case "llmc":
            write_llmc(path, ids)
        case "npy":
            np.save(path, np.array(ids))
        case "parquet":
            write_parquet(path, lists([ids]))
        case "arrow":
            write_arrow(path, lists([ids]))
        case "raw":
            write_raw(path, ids)
    options = {"token_dtype": "uint16"} if form == "raw" else {}
    if form == wanted:
        assert open_token_files(str(path), token_format=wanted, **options).length == 89
        return
    problem = refused(path, token_format=wanted, **options)
    assert problem.where == str(path)
    names = {"quadriga": "quadriga tokenize"}
    names |= {"megatron": "Megatron", "llmc": "llm.c", "npy": "NumPy", "parquet": "Parquet", "arrow": "Arrow"}
    assert names.get(form, "without a header") in problem.what or "no index of Megatron" in problem.what
    assert f"training.token_format to {form}" in str(problem.fix)


def test_several_formats_in_one_folder_are_refused(tmp_path):
    write_llmc(tmp_path / "a.bin", range(5))
    write_parquet(tmp_path / "b.parquet", lists([[1]]))
    problem = refused(tmp_path)
    assert "a.bin is a file with the header of llm.c; b.parquet is a Parquet file" in problem.what


@pytest.mark.parametrize("form", ["llmc", "npy", "parquet", "arrow", "megatron"])
def test_another_type_than_that_of_the_file_is_refused(tmp_path, form):
    if form == "megatron":
        write_megatron(tmp_path / "a", [[[1]]], "int32")
    elif form == "llmc":
        write_llmc(tmp_path / "a.bin", [1], "uint32")
    elif form == "npy":
        np.save(tmp_path / "a.npy", np.array([1], "int32"))
    else:
        {"parquet": write_parquet, "arrow": write_arrow}[form](tmp_path / f"a.{form}", lists([[1]]))
    problem = refused(tmp_path, token_dtype="uint16")
    assert "the file says that its ids are " in problem.what
    assert problem.value == "uint16"
    there = open_token_files(str(tmp_path))._parts[0].dtype.name
    assert problem.fix == f"set training.token_dtype to {there}"
    assert open_token_files(str(tmp_path), token_dtype=there).length == 1


def test_all_files_are_reported_together(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.bin").write_bytes(b"\x01\x02\x03")
    with pytest.raises(UserError) as caught:
        open_token_files(str(tmp_path), token_dtype="uint16")
    assert len(caught.value.problems) == 2


def test_after_some_files_that_cannot_be_read_no_other_is_opened(tmp_path, monkeypatch):
    """Each takes some seconds, so that of ten thousand the run would hear after hours."""
    for number in range(60):
        write_raw(tmp_path / f"{number}.bin", range(9))
    opened: list[str] = []

    def unreadable(files, decoded, options, manifests, file):
        opened.append(file.name)
        time.sleep(0.01)
        return UserError(Problem(file.name, "cannot be read"))

    monkeypatch.setattr(token_files, "_opened", unreadable)
    with pytest.raises(UserError) as caught:
        open_token_files(str(tmp_path), token_dtype="uint16")
    assert len(caught.value.problems) == 10
    assert len(opened) < 40


# --- headerless files -----------------------------------------------------------------------------------------------

OTHERS = {
    "text": (b"plain text in English, and then some more of it, long enough.\n" * 3, "is text, not token ids"),
    "json lines": ('{"text": "漢字"}\n'.encode() * 50, "is text, not token ids"),
    "gzip": (gzip.compress(bytes(range(200))), "compressed by gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(range(200)), "compressed by zstd"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n" + b"oid sha256:0\n", "a pointer of Git LFS"),
    "sqlite": (b"SQLite format 3\x00" + bytes(100), "an SQLite database"),
    "index": (b"MMIDIDX\x00\x00" + bytes(101), "an index of Megatron's token files"),
    "empty": (b"", "every file is empty"),
    "odd": (b"\x01\x02\x03\x04\x05", "its 5 bytes are no whole number of uint16 ids of 2 bytes"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_files_are_not_read_as_ids(tmp_path, other):
    content, what = OTHERS[other]
    (tmp_path / "a.bin").write_bytes(content)
    assert what in refused(tmp_path, token_dtype="uint16").what


def test_an_empty_file_among_others_is_refused(tmp_path):
    write_raw(tmp_path / "a.bin", range(5))
    (tmp_path / "b.bin").touch()
    assert refused(tmp_path, token_dtype="uint16").what == "the file is empty"


@pytest.mark.parametrize(("real", "named"), [("uint32", "uint16"), ("int64", "uint32"), ("int64", "int32")])
def test_ids_that_are_wider_than_their_named_type_are_noticed(tmp_path, real, named):
    write_raw(tmp_path / "a.bin", range(1, 500), real)
    problem = refused(tmp_path, token_dtype=named)
    assert "its ids are wider" in problem.what
    assert real in str(problem.fix)
    assert open_token_files(str(tmp_path), token_dtype=real).read(0, 2).tolist() == [1, 2]


def test_ids_of_one_byte_can_look_like_text(tmp_path):
    content = b"plain text in English, and then some more of it, long enough.\n" * 3
    (tmp_path / "a.bin").write_bytes(content)
    assert bytes(open_token_files(str(tmp_path), token_dtype="uint8").read(0, len(content)).tolist()) == content
    assert "is text, not token ids" in refused(tmp_path, token_dtype="int16").what


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_zeros_in_ids_of_the_widest_type_are_ids(tmp_path, dtype):
    write_raw(tmp_path / "a.bin", [5, 0] * 100, dtype)
    assert open_token_files(str(tmp_path), token_dtype=dtype).read(0, 3).tolist() == [5, 0, 5]


# --- llm.c and NumPy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [4, 6, -1, 2**31 - 1])
def test_the_header_of_llmc_must_count_the_ids(tmp_path, count):
    (tmp_path / "a.bin").write_bytes(llmc_header(count) + bytes(10))
    assert f"its header counts {count:,} ids" in refused(tmp_path).what


def test_a_short_header_of_llmc_is_refused(tmp_path):
    (tmp_path / "a.bin").write_bytes(llmc_header(0)[:100])
    assert "its header counts 0 ids, which makes 1,024 bytes; it has 100 bytes" in refused(tmp_path).what


def test_files_without_any_id_are_refused(tmp_path):
    write_llmc(tmp_path / "a.bin", [])
    assert refused(tmp_path).what == "the files have no token id"


def test_only_rows_of_integers_are_read_from_numpy(tmp_path):
    path = tmp_path / "a.npy"
    for array, what in (
        (np.zeros((3, 2), "u2"), "has 2 dimensions"),
        (np.zeros((), "u2"), "has 0 dimensions"),
        (np.zeros(3, "f4"), "of type float32"),
        (np.zeros(3, "u2,u2"), "of type [("),
        (np.array([{}]), "of type object"),
    ):
        np.save(path, array, allow_pickle=True)
        assert what in refused(path).what
    whole = np.lib.format.magic(1, 0)
    shape = b"{'descr': '<u8', 'fortran_order': False, 'shape': (%s,), }\n"
    for header in (b"{" * 200, shape % b"-3", shape % (b"9" * 4300), shape % (b"9" * 9000), b"x" * 30, b""):
        path.write_bytes(whole + struct.pack("<H", len(header)) + header)
        assert "header" in (what := refused(path).what)
        assert len(what) < 300
    np.save(path, np.arange(5, dtype="u2"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "its header counts 5 ids" in refused(path).what


def test_nothing_is_unpickled(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "harm",)

    np.save(tmp_path / "a.npy", np.array([Harmful()]), allow_pickle=True)
    assert "of type object" in refused(tmp_path).what
    (tmp_path / "a.npy").write_bytes(pickle.dumps(Harmful()))
    assert refused(tmp_path)
    assert not (tmp_path / "harm").exists()


# --- Megatron -------------------------------------------------------------------------------------------------------


def edited(tmp_path: Path, at: int, form: str, value: int) -> Path:
    """A pair of two documents and three sequences, with one changed number of its index."""
    write_megatron(tmp_path / "a", [[[1, 2], [3]], [[4, 5, 6]]])
    index = bytearray((tmp_path / "a.idx").read_bytes())
    struct.pack_into(form, index, at, value)
    (tmp_path / "a.idx").write_bytes(index)
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("at", "form", "value", "what"),
    [
        (9, "<Q", 2, "of version 2; only version 1"),
        (17, "<B", 6, "float64 values, not token ids (type code 6)"),
        (17, "<B", 7, "float32 values, not token ids (type code 7)"),
        (17, "<B", 9, "values of unknown type (type code 9)"),
        (17, "<B", 4, "its last sequence ends at byte"),
        (18, "<q", 4, "it counts 4 sequences and 3 document indices"),
        (18, "<q", -1, "it counts -1 sequences"),
        (26, "<q", 2**62, "it counts 3 sequences and 4,611,686,018,427,387,904 document indices"),
        (34 + 8, "<i", 9, "its last sequence ends at byte 24 of a.bin, which has 12 bytes"),
        (46 + 16, "<q", 0, "its last sequence ends at byte 6 of a.bin"),
        (70, "<q", 1, "do not begin with 0"),
        (70 + 16, "<q", 2, "and end with the number of sequences"),
    ],
)
def test_an_index_that_cannot_be_right_is_refused_at_the_start(tmp_path, at, form, value, what):
    problem = refused(edited(tmp_path, at, form, value))
    assert problem.where == f"{tmp_path}/a.idx"
    assert what in problem.what


@pytest.mark.parametrize(
    ("at", "form", "value", "what"),
    [
        (34 + 4, "<i", 2, "sequence 2 of 3 ids begins at byte 6; the one before it ends at byte 8"),
        (34 + 4, "<i", -1, "sequence 1 of -1 ids"),
        (46 + 8, "<q", 6, "sequence 1 of 1 ids begins at byte 6; the one before it ends at byte 4"),
        (70 + 8, "<q", 9, "document 2 begins before the one before it"),
        (70 + 8, "<q", -9, "document 1 begins before the one before it"),
    ],
)
def test_a_wrong_entry_of_an_index_is_found_by_a_verification(tmp_path, at, form, value, what):
    path = edited(tmp_path, at, form, value)
    problems = wrong(path)
    assert [what in problem.what for problem in problems] == [True]
    assert problems[0].where == f"{tmp_path}/a.idx"


@pytest.mark.parametrize("value", [9, -9, 2**62])
def test_a_wrong_entry_that_is_met_is_never_a_wrong_document(tmp_path, value):
    for at in (46 + 8, 70 + 8):
        tokens = open_token_files(str(edited(tmp_path, at, "<q", value)))
        try:
            found = tokens.documents(0, 6)
        except UserError as error:
            found = error.problems[0].what
        assert found == ((0, 0), (0, 1)) or "the index is damaged" in found


def test_the_older_format_is_refused_by_name(tmp_path):
    write_raw(tmp_path / "a.bin", range(100))
    (tmp_path / "a.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(100))
    problem = refused(tmp_path / "a", token_dtype="uint16")
    assert "TNTIDX" in problem.what
    assert "--dataset-impl mmap" in str(problem.fix)


def test_half_a_pair_is_refused(tmp_path):
    write_megatron(tmp_path / "a", [[[1, 2]]])
    write_megatron(tmp_path / "b", [[[1, 2]]])
    (tmp_path / "a.bin").unlink()
    for path in (tmp_path, tmp_path / "a", tmp_path / "a.idx", tmp_path / "a.bin", tmp_path / "*"):
        assert "the index has no data file a.bin next to it" in refused(path).what
    (tmp_path / "b.idx").write_bytes(b"MMI")
    assert "is not an index of Megatron" in refused(tmp_path / "b").what
    (tmp_path / "b.idx").write_bytes(b"MMIDIDX\x00\x00")
    assert "fewer than its header" in refused(tmp_path / "b").what


def test_what_is_next_to_a_data_file_and_is_no_index_is_not_passed_over(tmp_path):
    index, options = tmp_path / "a.idx", {"token_dtype": "uint16"}
    write_raw(tmp_path / "a.bin", range(1, 90))
    for content in (b"", b"MMI", bytes(100)):
        index.write_bytes(content)
        problem = refused(tmp_path / "a.bin", **options)
        assert problem.where == str(index)
        assert "is not an index of Megatron" in problem.what
        assert open_token_files(str(tmp_path / "a.bin"), token_format="raw", **options).length == 89
    index.unlink()
    os.mkfifo(index)
    for path in (tmp_path, tmp_path / "a.bin", tmp_path / "a"):
        assert "is a FIFO, not a regular file" in refused(path, **options).what
    index.unlink()
    index.symlink_to(tmp_path / "gone")
    for path in (tmp_path, tmp_path / "a.bin", tmp_path / "a"):
        assert "is a link that leads nowhere" in refused(path, **options).what
    index.unlink()
    index.mkdir()
    assert open_token_files(str(tmp_path / "a.bin"), **options).length == 89


def test_indexes_that_are_named_without_their_data_are_refused(tmp_path):
    write_megatron(tmp_path / "a", [[[1, 2]]])
    assert "the index is named without its data file a.bin" in refused(tmp_path / "*.idx").what
    assert open_token_files(str(tmp_path / "*.bin")).length == 2


@pytest.mark.parametrize("length", [251, 252, 255])
def test_long_names_without_a_pair_are_refused(tmp_path, length):
    assert "there is no such file" in refused(tmp_path / ("a" * length)).what
    assert assets.data_files("tokens", str(tmp_path / ("a" * length))) == []


def test_indexes_of_documents_without_ids_take_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "TOKEN_EMPTY_DOCUMENTS", 10)
    write_megatron(tmp_path / "a", [[[1, 2]], *[[[]]] * 9, [[3]]])
    assert open_token_files(str(tmp_path / "a")).documents(0, 3) == ((0, 0), (0, 10))
    for documents in ([[[1, 2]], *[[[]]] * 20, [[3]]], [[[1, 2]], *[[]] * 20, [[3]]]):
        write_megatron(tmp_path / "a", documents)
        assert "of which most have no ids" in refused(tmp_path / "a").what
    write_megatron(tmp_path / "a", [[[1] * 20], *[[[]]] * 12, [[2] * 20]])
    tokens = open_token_files(str(tmp_path / "a"))
    assert tokens.documents(0, 40) == ((0, 0), (0, 13))
    with pytest.raises(UserError, match="more than 10 documents from number 0 on have no ids"):
        tokens.documents(19, 21)


# --- columns --------------------------------------------------------------------------------------------------------

COLUMN_WRITERS = {"parquet": write_parquet, "arrow": write_arrow}


@pytest.mark.parametrize("form", COLUMN_WRITERS)
def test_columns_that_are_not_ids_are_refused(tmp_path, form):
    def problem(columns: dict, field: str | None = None) -> Problem:
        COLUMN_WRITERS[form](tmp_path / f"a.{form}", pa.table(columns))
        return refused(tmp_path, field=field)

    assert "no column `ids`; its columns are a, b" in problem({"a": [1], "b": [1]}, "ids").what
    assert "no column `input_ids`; its columns are a, b" in problem({"a": [1], "b": [1]}).what
    found = problem({"a": [[1]], "b": ["x"]}, "b")
    assert "the column `b` is of type string" in found.what
    assert "here perhaps a" in str(found.fix)
    assert "is of type list<" in problem({"input_ids": [[1.0]]}).what
    assert "has 1 nulls" in wrong_or_refused(tmp_path, form, [1, None], pa.int32())
    assert "nulls" in wrong_or_refused(tmp_path, form, [[1], None, [2]], pa.list_(pa.int32()))
    assert "nulls" in wrong_or_refused(tmp_path, form, [[1], [None], [2]], pa.list_(pa.int32()))


def wrong_or_refused(tmp_path: Path, form: str, values: list, kind: pa.DataType) -> str:
    COLUMN_WRITERS[form](tmp_path / f"a.{form}", pa.table({"input_ids": pa.array(values, kind)}))
    try:
        return wrong(tmp_path)[0].what
    except UserError as error:
        return error.problems[0].what.replace("has nulls", "has 1 nulls")


def test_parquet_that_cannot_be_counted_is_refused(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", lists([[1], [2]]), write_statistics=False)
    assert "no statistics" in refused(tmp_path).what
    monkeypatch.setattr(limits, "TOKEN_ROW_GROUP", 5)
    write_parquet(tmp_path / "a.parquet", lists([[1] * 6]))
    problem = refused(tmp_path)
    assert "a row group has 6 ids" in problem.what
    assert "row_group_size" in str(problem.fix)
    write_parquet(tmp_path / "a.parquet", lists([[1], *[[]] * 5]), rows=6)
    assert "a row group has 6 rows" in refused(tmp_path).what


def test_compressed_arrow_is_refused_with_the_way_out(tmp_path):
    import pyarrow.feather

    table = lists([[1, 2], [3]])
    pyarrow.feather.write_feather(table, str(tmp_path / "a.arrow"), compression="lz4")
    problem = refused(tmp_path)
    assert "compressed" in problem.what
    assert "write_feather" in str(problem.fix)
    pyarrow.feather.write_feather(table, str(tmp_path / "a.arrow"), compression="uncompressed")
    assert open_token_files(str(tmp_path)).documents(0, 3) == ((0, 0), (0, 1))


def test_record_batches_that_are_the_same_are_refused(tmp_path):
    """The footer of an Arrow file could list one batch a million times."""
    path = tmp_path / "a.arrow"
    write_arrow(path, lists([[1] * 9000, [2], [3]]), rows=1)
    content = path.read_bytes()
    footer = len(content) - 10 - int.from_bytes(content[-10:-6], "little")
    first = content.find(b"\xff" * 4, 16)
    at = content.find(struct.pack("<q", first), footer)  # the first of three blocks
    assert footer < at
    path.write_bytes(content[:at] + 3 * content[at : at + 24] + content[at + 72 :])
    assert "several of its record batches have the same ids" in refused(path).what
    path.write_bytes(content)
    assert open_token_files(str(path)).length == 9002


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_that_was_not_copied_whole_is_refused(tmp_path, stream):
    path = tmp_path / "a.arrow"
    write_arrow(path, lists([[1, 2], [3], [4, 5]] * 3), stream=stream)
    content, reports = path.read_bytes(), []
    for length in range(9, len(content) - 8, 7):
        path.write_bytes(content[:length])
        try:
            tokens = open_token_files(str(tmp_path))
        except UserError as error:
            reports.append(error.report)
        else:
            assert stream  # which can end after any message
            assert tokens.length in (5, 10)
    assert all("not a readable Arrow file" in report or "no token id" in report for report in reports)


def test_pyarrow_is_asked_for_by_name(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", lists([[1]]))
    write_arrow(tmp_path / "b.arrow", lists([[1]]))
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    assert "needs pyarrow, which is not installed" in refused(tmp_path / "a.parquet").what
    assert "needs pyarrow, which is not installed" in refused(tmp_path / "b.arrow").what


# --- ids ------------------------------------------------------------------------------------------------------------


def test_negative_ids_and_ids_above_int64_stop_the_reading(tmp_path):
    np.save(tmp_path / "a.npy", np.array([1, 2, -3, 4], "i2"))
    np.save(tmp_path / "b.npy", np.array([1, 2**63 + 5], "u8"))
    tokens = open_token_files(str(tmp_path))
    assert tokens.read(0, 2).tolist() == [1, 2]
    with pytest.raises(UserError, match=r"a\.npy, token 2(.|\n)*the id -3 is negative"):
        tokens.read(1, 5)
    with pytest.raises(UserError, match=r"b\.npy, token 1(.|\n)*the id 9223372036854775813 is above the largest int64"):
        tokens.read(4, 6)
    assert [problem.where for problem in tokens.verify(None)] == [
        f"{tmp_path}/a.npy, token 2",
        f"{tmp_path}/b.npy, token 1",
    ]


def test_a_verification_names_the_first_wrong_id_of_each_file(tmp_path, monkeypatch):
    monkeypatch.setattr("quadriga.data.token_ids.VERIFIED_AT_ONCE", 3)
    write_raw(tmp_path / "a.bin", [1, 99, 3, 100, 5, 200, 300])
    write_raw(tmp_path / "b.bin", [1, 2])
    problems = wrong(tmp_path, token_dtype="uint16")
    assert [problem.where for problem in problems] == [f"{tmp_path}/a.bin, token 3"]
    assert problems[0].what == "the id 100 is not in the vocabulary, the first of 3 such ids"
    assert not wrong(tmp_path, 301, token_dtype="uint16")


def test_caches_of_datasets_are_not_read_twice(tmp_path):
    write_arrow(tmp_path / "data-00000-of-00001.arrow", lists([[1]]), stream=True)
    write_arrow(tmp_path / "cache-0123.arrow", lists([[1]]), stream=True)
    assert "is a cache" in refused(tmp_path).what
    assert open_token_files(str(tmp_path / "data-*.arrow")).length == 1
