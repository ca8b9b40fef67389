"""Files of token ids are one sequence of ids: read, documents and borders equal those of a plain loop."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_writers import (
    MEGATRON_CODES,
    lists,
    llmc_header,
    write_arrow,
    write_llmc,
    write_megatron,
    write_parquet,
    write_raw,
    write_shards,
)

from quadriga.data import stored_arrays, token_files, token_parquet
from quadriga.data.parquet import open_parquet
from quadriga.data.stored_arrays import OpenFiles
from quadriga.data.token_files import TOKEN_FORMATS, TokenFiles, open_token_files
from quadriga.errors import UserError

EOS = 7
IDS = st.integers(0, 120)  # fit in every dtype, and EOS is among them
DOCUMENTS = st.lists(st.lists(IDS, max_size=9), min_size=1, max_size=7)
FILES = st.lists(DOCUMENTS, min_size=1, max_size=4).filter(lambda files: any(any(one) for one in files))
INDEXED = ("quadriga", "megatron", "parquet", "parquet large", "arrow", "arrow stream", "arrow large")
NOT_INDEXED = ("raw", "raw npy", "llmc", "npy", "npy big-endian", "parquet ids", "arrow ids")


def write(folder: Path, form: str, files: list[list[list[int]]]) -> dict[str, str]:
    """Writes the documents of each file, and returns the options that they are opened with."""
    if form == "quadriga":
        write_shards(folder, files)
        return {}
    for number, documents in enumerate(files):
        ids = [one for document in documents for one in document]
        path = folder / f"{number:05d}"
        table = lists(documents, pa.large_list(pa.uint32()) if "large" in form else None)
        if form.endswith(" ids"):
            table = pa.table({"before": [str(one) for one in ids], "ids": pa.array(ids, pa.int64())})
        match form.split()[0]:
            case "megatron":
                # Every document in two sequences, one of which can be empty.
                write_megatron(path, [[document[:2], document[2:]] for document in documents], modes=number % 2 == 1)
            case "parquet":
                write_parquet(path.with_suffix(".parquet"), table)
            case "arrow":
                write_arrow(path.with_suffix(".arrow"), table, stream="stream" in form)
            case "llmc":
                write_llmc(path.with_suffix(".bin"), ids, ("uint16", "uint32")[number % 2])
            case "npy":
                np.save(path, np.array(ids, ">u2" if "big" in form else "<i4"))
            case "raw":
                write_raw(path.with_suffix(".npy" if "npy" in form else ".bin"), ids)
    return {"token_dtype": "uint16"} if form.startswith("raw") else {}


def expected_documents(files: list[list[list[int]]], start: int, stop: int) -> tuple[tuple[int, int], ...]:
    owners = [(i, j) for i, documents in enumerate(files) for j, document in enumerate(documents) for _ in document]
    return tuple(dict.fromkeys(owners[start:stop]))


def expected_borders(files: list[list[list[int]]], start: int, stop: int) -> list[int]:
    ends = np.cumsum([len(document) for documents in files for document in documents])
    return sorted({int(end) - start for end in ends if start < end <= stop})


@pytest.mark.parametrize("form", [*INDEXED, *NOT_INDEXED])
@settings(max_examples=25, deadline=None)
@given(files=FILES, data=st.data())
def test_every_range_is_that_of_the_plain_sequence(form, files, data):
    if form.startswith("raw"):
        files = [documents for documents in files if any(documents)]  # an empty file is refused
    ids = [one for documents in files for document in documents for one in document]
    with TemporaryDirectory() as temporary:
        options = write(Path(temporary), form, files)
        eos = EOS if form in NOT_INDEXED else None
        tokens = open_token_files(temporary, eos_id=eos, **options)
        assert tokens.length == len(ids)
        start = data.draw(st.integers(0, len(ids)))
        stop = data.draw(st.integers(start, len(ids)))
        read = tokens.read(start, stop)
        assert read.dtype == np.int64
        assert read.tolist() == ids[start:stop]
        if form in INDEXED:
            assert tokens.documents(start, stop) == expected_documents(files, start, stop)
            assert tokens.borders(start, stop).tolist() == expected_borders(files, start, stop)
        else:
            assert tokens.borders(start, stop).tolist() == [
                at + 1 for at, one in enumerate(ids[start:stop]) if one == EOS
            ]
            places = [(i, j) for i, documents in enumerate(files) for j in range(sum(map(len, documents)))]
            new = [at for at in range(start, stop) if at == start or ids[at - 1] == EOS or places[at][1] == 0]
            assert tokens.documents(start, stop) == tuple(places[at] for at in new)
        assert not list(tokens.verify(121))
        tokens.close()


@pytest.mark.parametrize("dtype", MEGATRON_CODES)
@pytest.mark.parametrize("modes", [False, True])
def test_every_type_code_of_megatron_is_read(tmp_path, dtype, modes):
    write_megatron(tmp_path / "a", [[[1, 2, 3], [4]], [[5]], []], dtype, modes)
    with_all_names = [tmp_path, tmp_path / "a", tmp_path / "a.bin", tmp_path / "a.idx", tmp_path / "*.bin"]
    for path in with_all_names:
        tokens = open_token_files(str(path), token_format="megatron", token_dtype=dtype)
        assert tokens.read(0, 5).tolist() == [1, 2, 3, 4, 5]
        assert tokens.documents(0, 5) == ((0, 0), (0, 1))
        assert tokens.borders(0, 5).tolist() == [4, 5]
        assert not list(tokens.verify(6))


@pytest.mark.parametrize("size", [2, 100_000])
def test_long_indexes_are_searched(tmp_path, size):
    """Documents are found in every region of an index that is longer than the blocks of a search."""
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 4, size)
    documents = [[[1] * count] for count in counts]
    documents[-1] = [[1]]
    write_megatron(tmp_path / "a", documents)
    tokens = open_token_files(str(tmp_path))
    owner = np.repeat(np.arange(size), [len(document[0]) for document in documents])
    for start in {0, tokens.length - 1, *rng.integers(0, tokens.length, 50).tolist()}:
        stop = min(start + 2049, tokens.length)
        assert [number for _, number in tokens.documents(start, stop)] == np.unique(owner[start:stop]).tolist()
    assert len(tokens.documents(0, tokens.length)) == len(np.unique(owner))


def test_without_index_and_eos_nothing_separates_documents(tmp_path):
    write_raw(tmp_path / "a.bin", range(9))
    tokens = open_token_files(str(tmp_path), token_dtype="uint16")
    assert tokens.documents(2, 9) == ()
    assert tokens.borders(2, 9).tolist() == []
    assert tokens.format_location(5) == f"{tmp_path}/a.bin, token 5"


def test_ranges_outside_are_refused(tmp_path):
    write_raw(tmp_path / "a.bin", range(9))
    tokens = open_token_files(str(tmp_path), token_dtype="uint16")
    for start, stop in ((-1, 3), (3, 10), (4, 3)):
        with pytest.raises(ValueError, match=r"are not within \[0, 9\)"):
            tokens.read(start, stop)
    with pytest.raises(ValueError, match="are not within"):
        tokens.format_location(9)
    tokens.close()
    with pytest.raises(ValueError, match="are closed"):
        tokens.read(0, 1)


def test_the_formats_are_named():
    assert TOKEN_FORMATS == ("auto", "quadriga", "megatron", "llmc", "npy", "parquet", "arrow", "raw")


def test_the_fingerprint_is_of_the_data_and_not_of_the_place(tmp_path):
    def fingerprint(name: str, **options) -> str:
        return open_token_files(str(tmp_path / name), **options).fingerprint

    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        write_raw(tmp_path / name / "x.bin", range(8 + (name == "c")))
    same = fingerprint("a", token_dtype="uint16")
    assert same == fingerprint("b", token_dtype="uint16", token_format="raw")
    others = {
        fingerprint("c", token_dtype="uint16"),
        fingerprint("a", token_dtype="int16"),
        fingerprint("a", token_dtype="uint16", eos_id=3),
    }
    assert len(others | {same}) == 4
    assert not any(";" in one or " " in one for one in others | {same})


def test_columns_have_their_own_fingerprint(tmp_path):
    write_parquet(tmp_path / "a.parquet", pa.table({"input_ids": [1, 2], "other; ids": [3, 4]}))
    plain = open_token_files(str(tmp_path))
    other = open_token_files(str(tmp_path), field="other; ids")
    assert other.read(0, 2).tolist() == [3, 4]
    assert plain.fingerprint != other.fingerprint
    assert ";" not in other.fingerprint
    assert plain.fingerprint == open_token_files(str(tmp_path), field="input_ids").fingerprint


def test_the_index_is_a_part_of_the_data(tmp_path):
    found = set()
    for documents in ([[[1, 2, 3]]], [[[1], [2, 3]]], [[[1]], [[2, 3]]]):
        write_megatron(tmp_path / "a", documents)
        found.add(open_token_files(str(tmp_path / "a")).fingerprint)
    assert len(found) == 3


# --- files that change or fail --------------------------------------------------------------------------------------


def opened_raw(tmp_path: Path, count: int = 1000) -> TokenFiles:
    write_raw(tmp_path / "a.bin", np.arange(1, count + 1))
    return open_token_files(str(tmp_path), token_dtype="uint16")


def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    tokens = opened_raw(tmp_path)
    os.truncate(tmp_path / "a.bin", 100)
    with pytest.raises(UserError, match=r"a\.bin(.|\n)*the file ends at byte 100; it had 2,000 bytes"):
        tokens.read(40, 60)


def test_a_file_that_was_replaced_is_named(tmp_path):
    tokens = opened_raw(tmp_path)
    tokens._open.close()
    tokens._open.__init__()
    write_raw(tmp_path / "a.bin", range(3))
    with pytest.raises(UserError, match="it has 6 bytes, and had 2,000 when the run began"):
        tokens.read(0, 1)


@pytest.mark.parametrize("times", [2, 9])
def test_a_read_that_fails_is_repeated_and_then_reported(tmp_path, monkeypatch, caplog, times):
    tokens = opened_raw(tmp_path)
    failed, pread = [], os.pread

    def fail(*arguments):
        if len(failed) < times:
            failed.append(1)
            raise OSError(errno.EIO, "Input/output error")
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", fail)
    monkeypatch.setattr(stored_arrays, "PAUSES", (0, 0, 0))
    if times == 2:
        assert tokens.read(0, 3).tolist() == [1, 2, 3]
    else:
        with pytest.raises(UserError, match=r"a\.bin(.|\n)*cannot be read: Input/output error"):
            tokens.read(0, 3)
    assert "trying again" in caplog.text


@pytest.mark.parametrize("times", [2, 9])
def test_a_read_of_parquet_that_fails_is_repeated_and_then_reported(tmp_path, monkeypatch, caplog, times):
    write_parquet(tmp_path / "a.parquet", lists([[1, 2, 3]]))
    failed: list[int] = []

    def fail(file):
        if len(failed) < times:
            failed.append(1)
            raise OSError(errno.EIO, "Input/output error")
        return open_parquet(file)

    monkeypatch.setattr(token_parquet, "open_parquet", fail)
    monkeypatch.setattr(stored_arrays, "PAUSES", (0, 0, 0))
    if times == 2:
        tokens = open_token_files(str(tmp_path))
        assert len(failed) == 2
        failed.clear()
        assert tokens.read(0, 3).tolist() == [1, 2, 3]
        assert len(failed) == 2
    else:
        with pytest.raises(UserError, match=r"a\.parquet(.|\n)*cannot be read: Input/output error"):
            open_token_files(str(tmp_path))
        assert len(failed) == 4
    assert "trying again" in caplog.text


def test_parquet_that_is_damaged_or_gone_is_not_read_again(tmp_path, caplog):
    write_parquet(tmp_path / "a.parquet", lists([list(range(500))]), compression="none")
    tokens = open_token_files(str(tmp_path))
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(UserError, match="not a readable Parquet file"):
        tokens.read(0, 3)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(UserError, match="the data file cannot be read"):
        tokens.read(0, 3)
    assert "trying again" not in caplog.text


def test_many_files_are_read_by_threads_with_few_of_them_open(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "OpenFiles", lambda: OpenFiles(most=5))
    for number in range(40):
        write_raw(tmp_path / f"{number:02d}.bin", [number] * 50)
    tokens = open_token_files(str(tmp_path), token_dtype="uint16")
    expected = np.repeat(np.arange(40), 50)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, 1900, 400).tolist():
            if not np.array_equal(tokens.read(start, start + 100), expected[start : start + 100]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    most = 0
    while any(thread.is_alive() for thread in threads):
        most = max(most, len(tokens._open._open))
    assert not wrong
    assert most <= 5 + 8  # those in use by a thread are not closed
    tokens.read(0, 1000)
    assert len(tokens._open._open) <= 5
    tokens.close()
    assert not tokens._open._open
    assert not [link for link in os.listdir("/proc/self/fd") if f"{tmp_path}" in _target(link)]


def _target(link: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{link}")
    except OSError:
        return ""


def test_row_groups_that_are_read_again_are_kept_up_to_a_limit(tmp_path, monkeypatch):
    from quadriga.data.token_parquet import DecodedGroups

    monkeypatch.setattr(token_files, "DecodedGroups", lambda: DecodedGroups(most=100))
    write_parquet(tmp_path / "a.parquet", lists([[number] * 4 for number in range(60)]), rows=2)
    tokens = open_token_files(str(tmp_path))
    for _ in range(2):
        assert tokens.read(0, 240).tolist() == np.repeat(np.arange(60), 4).tolist()
    decoded = tokens._parts[0]._decoded
    assert 1 <= len(decoded._kept) <= 2
    assert decoded._bytes <= 100


# --- index arithmetic beyond 2^32 ------------------------------------------------------------------------------------


def test_positions_beyond_a_tera_of_ids(tmp_path):
    """Sparse files: ids that are written far out are found there, and each file ends where it should."""
    count = 1 << 40
    path = tmp_path / "a.bin"
    with open(path, "wb") as file:
        file.truncate(2 * count)
        os.pwrite(file.fileno(), np.array([11, 12, 13], "<u2").tobytes(), 2 * (count - 3))
    write_raw(tmp_path / "b.bin", [21, 22])
    tokens = open_token_files(str(tmp_path), token_dtype="uint16", eos_id=12)
    assert tokens.length == count + 2
    assert tokens.read(count - 4, count + 2).tolist() == [0, 11, 12, 13, 21, 22]
    assert tokens.documents(count - 4, count + 1) == ((0, count - 4), (0, count - 1), (1, 0))
    assert tokens.format_location(count + 1) == f"{tmp_path}/b.bin, token 1"


def test_llmc_files_with_a_sparse_body_are_counted_by_their_header(tmp_path):
    with open(tmp_path / "a.bin", "wb") as file:
        file.write(llmc_header(10**9))
        file.truncate(1024 + 2 * 10**9)
    assert open_token_files(str(tmp_path)).length == 10**9
