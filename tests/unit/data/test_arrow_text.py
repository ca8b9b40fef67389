"""Text columns of Arrow files, and the folders of `save_to_disk`."""

from __future__ import annotations

import errno
import os
import shutil

import pyarrow as pa
import pytest

from quadriga.config.schema import TextKeys
from quadriga.data import stored_arrays
from quadriga.data.catalogue import open_source
from quadriga.data.sources import BadRecord
from quadriga.errors import UserError

TEXTS = [f"{i} Füße 漢字 " + "word " * (i % 40) for i in range(700)]
TYPES = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "string_view": pa.string_view(),
    "binary_view": pa.binary_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


def write(path, columns, *, chunk=300, compression=None, stream=False):
    table = pa.table(columns)
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=chunk)
    return str(path)


def column(kind, texts=TEXTS):
    if pa.types.is_dictionary(kind):
        return pa.array(texts).dictionary_encode()
    return pa.array(texts if "string" in str(kind) else [text and text.encode() for text in texts], kind)


def read(source):
    return [source.parse(record).text for shard in range(source.shards) for record in source.read(shard)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("kind", TYPES)
def test_each_type_is_read(tmp_path, kind, compression, stream):
    nested = pa.array([[i] for i in range(len(TEXTS))])
    columns = {"n": range(len(TEXTS)), "lists": nested, "text": column(TYPES[kind])}
    path = write(tmp_path / "a.arrow", columns, compression=compression, stream=stream)
    source = open_source(TextKeys("arrow", path))
    assert read(source) == TEXTS
    assert source.shards == 3
    assert source.format_location(2, 600) == f"{path}, row 601"


def test_a_slice_with_nulls_is_read_and_nulls_are_bad_records(tmp_path):
    texts = [None if i % 7 == 3 else text for i, text in enumerate(TEXTS)]
    for number, compression in enumerate((None, "zstd")):
        sliced = column(pa.string(), texts)[13:613]  # its offsets do not begin with 0
        source = open_source(
            TextKeys("arrow", write(tmp_path / f"{number}.arrow", {"text": sliced}, compression=compression))
        )
        records = [record for shard in range(source.shards) for record in source.read(shard)]
        assert len(records) == 600
        for record, text in zip(records, texts[13:613], strict=True):
            if text is None:
                with pytest.raises(BadRecord, match="`text` is null"):
                    source.parse(record)
            else:
                assert source.parse(record).text == text


def test_what_is_not_utf8_or_too_long_is_a_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr("quadriga.limits.DOCUMENT_BYTES", 1000)
    cells = pa.array([b"good", b"\xff", b"x" * 2000], pa.binary())
    source = open_source(TextKeys("arrow", write(tmp_path / "a.arrow", {"text": cells})))
    good, wrong, long = source.read(0)
    assert source.parse(good).text == "good"
    with pytest.raises(BadRecord, match="not UTF-8: byte 0xff at offset 0"):
        source.parse(wrong)
    with pytest.raises(BadRecord, match="longer than the limit"):
        source.parse(long)


def test_memory_does_not_grow_with_a_record_batch(tmp_path, monkeypatch):
    """One record batch of the whole file is read in small ranges."""
    path = write(tmp_path / "a.arrow", {"text": column(pa.string(), TEXTS * 20)}, chunk=10**9)
    sizes = []
    real = stored_arrays.OpenFiles.read
    monkeypatch.setattr(
        stored_arrays.OpenFiles, "read", lambda self, file, at, size: sizes.append(size) or real(self, file, at, size)
    )
    monkeypatch.setattr("quadriga.data.arrow_text.BYTES_AT_ONCE", 1 << 14)
    source = open_source(TextKeys("arrow", path))
    assert read(source) == TEXTS * 20
    assert max(sizes) <= (1 << 14) + 1000 < os.path.getsize(path) // 50


def test_a_large_batch_that_is_compressed_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.arrow", {"text": column(pa.string(), ["x" * 10_000] * 100)}, compression="zstd")
    monkeypatch.setattr("quadriga.limits.ARROW_BATCH_BYTES", 1 << 19)
    assert os.path.getsize(path) < 1 << 15  # what it says of itself counts
    with pytest.raises(UserError, match=r"record batch 0 has 1,0.* bytes") as caught:
        read(open_source(TextKeys("arrow", path)))
    assert "max_chunksize" in str(caught.value.problems[0].fix)


@pytest.mark.parametrize(
    ("columns", "what", "fix"),
    [
        ({"text": [[1, 2]]}, "of type list<.*int64", "tokens"),
        ({"text": [1, 2]}, "of type int64", "tokens"),
        ({"body": ["a"]}, "no column `text`; its columns are body", "dataset_text_field"),
    ],
)
def test_other_columns_are_refused(tmp_path, columns, what, fix):
    with pytest.raises(UserError, match=what) as caught:
        open_source(TextKeys("arrow", write(tmp_path / "a.arrow", columns)))
    assert fix in str(caught.value.problems[0].fix)


@pytest.mark.parametrize("stream", [False, True])
def test_a_file_that_ends_early_is_damaged(tmp_path, stream):
    path = write(tmp_path / "a.arrow", {"text": TEXTS}, stream=stream)
    os.truncate(path, os.path.getsize(path) - 1000)
    with pytest.raises(UserError, match="not a readable Arrow file"):
        open_source(TextKeys("arrow", path))
    (tmp_path / "b.arrow").write_bytes(b"PAR1" * 100)
    with pytest.raises(UserError, match="the file is a Parquet file"):
        open_source(TextKeys("arrow", str(tmp_path / "b.arrow")))


def test_a_failed_read_is_repeated_and_then_stops(tmp_path, monkeypatch):
    path = write(tmp_path / "a.arrow", {"text": TEXTS})
    monkeypatch.setattr(stored_arrays, "PAUSES", (0, 0, 0))
    source = open_source(TextKeys("arrow", path))
    real, fails = os.pread, [2]

    def pread(*given):
        if fails[0] > 0:
            fails[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        return real(*given)

    monkeypatch.setattr(os, "pread", pread)
    assert read(source) == TEXTS
    fails[0] = 99
    with pytest.raises(UserError, match="cannot be read: Input/output error") as caught:
        read(source)
    assert not isinstance(caught.value, BadRecord)


# --- save_to_disk ---------------------------------------------------------------------------------------------------


@pytest.fixture
def data():
    return pytest.importorskip("datasets").Dataset.from_dict({"text": TEXTS, "n": range(len(TEXTS))})


def test_a_saved_data_set_is_read_without_its_cache(tmp_path, data):
    data.save_to_disk(str(tmp_path / "a"), num_shards=3)
    shutil.copy(tmp_path / "a/data-00000-of-00003.arrow", tmp_path / "a/cache-0123.arrow")
    assert read(open_source(TextKeys("arrow", str(tmp_path / "a")))) == TEXTS
    with pytest.raises(UserError, match="has no splits") as caught:
        open_source(TextKeys("arrow", str(tmp_path / "a"), split="train"))
    assert caught.value.problems[0].where == "training.dataset_split"


def test_the_split_of_a_saved_dictionary_is_named(tmp_path, data):
    import datasets

    half = {"train": data.select(range(600)), "test": data.select(range(600, 700))}
    datasets.DatasetDict(half).save_to_disk(str(tmp_path / "d"))
    keys = TextKeys("arrow", str(tmp_path / "d"), "validation")
    train, test = (open_source(keys._replace(split=name)) for name in ("train", "test"))
    assert read(train) + read(test) == TEXTS
    assert train.fingerprint != test.fingerprint
    assert train.files[0].name.startswith("train/")
    with pytest.raises(UserError, match="several splits") as caught:
        open_source(keys)
    assert caught.value.problems[0].where == "validation.dataset_split"
    assert caught.value.problems[0].allowed == "train, test"
    with pytest.raises(UserError, match="no such split") as caught:
        open_source(keys._replace(split="tset"))
    assert caught.value.problems[0].nearest == "test"
    datasets.DatasetDict({"only": half["test"]}).save_to_disk(str(tmp_path / "o"))
    assert read(open_source(TextKeys("arrow", str(tmp_path / "o")))) == TEXTS[600:]
