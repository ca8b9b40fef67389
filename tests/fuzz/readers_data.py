"""The readers of training data. A case is read as a start does it, and then whole, with bad records stopping or not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
from fuzzing import Reader

from quadriga.config.schema import TextKeys
from quadriga.data.catalogue import open_source
from quadriga.data.sources import BadRecord
from quadriga.data.survey import survey
from quadriga.data.tokenizer import ByteTokenizer

TEXTS = [f"document {i}: Füße, 漢字, {'words ' * (i % 40)}" for i in range(60)]
LINES = "".join(json.dumps({"text": text, "id": i, "more": [1.5, None]}) + "\n" for i, text in enumerate(TEXTS))
MARKS = [b"PAR1", b"\x15\x04", b"\x00" * 64, b"\xff" * 16, b"\n" * 10_000, gzip.compress(b"x" * 100_000), b"\x80" * 12]


def jsonl(folder: Path) -> None:
    (folder / "a.jsonl").write_text(LINES)


def jsonl_gz(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(LINES.encode(), mtime=0))


def text(folder: Path) -> None:
    (folder / "a.txt").write_text("\n".join(TEXTS))
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n".join(TEXTS).encode(), mtime=0))


def zstd(folder: Path) -> None:
    half = len(LINES) // 2
    frames = [pyarrow.compress(part.encode(), codec="zstd", asbytes=True) for part in (LINES[:half], LINES[half:])]
    (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    (folder / "b.txt.zst").write_bytes(b"".join(reversed(frames)))


def template(folder: Path) -> None:
    jsonl(folder)
    parquet(folder)


def parquet(folder: Path) -> None:
    columns = {
        "a": pyarrow.array(TEXTS),
        "b": pyarrow.array(TEXTS[:7] * 9).dictionary_encode()[:60],
        "c": pyarrow.array([text.encode() for text in TEXTS], pyarrow.binary_view()),
    }
    for (name, column), compression in zip(columns.items(), ("snappy", "zstd", "none"), strict=True):
        table = pyarrow.table({"id": range(60), "text": column})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=17, compression=compression)


def arrow(folder: Path) -> None:
    table = pyarrow.table({"id": range(60), "text": TEXTS, "more": pyarrow.array(TEXTS).dictionary_encode()})
    for number, compression in enumerate((None, None, "zstd", "lz4")):
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        make = pyarrow.ipc.new_file if number else pyarrow.ipc.new_stream
        with make(str(folder / f"{number}.arrow"), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=17)


def reader(kind: str, **keys: str):  # the dataset's name, and other keys
    def read(folder: Path) -> None:
        source = open_source(TextKeys(kind, str(folder), **keys), streams=2)
        survey(source, ByteTokenizer(), 2, skip_bad=True)
        for shard in range(source.shards):
            for record in source.read(shard):
                try:
                    assert isinstance(source.parse(record).text, str)
                except BadRecord as error:
                    str(error.report)
        survey(source, ByteTokenizer(), 2)

    return read


READERS = [
    Reader("data, jsonl", jsonl, reader("jsonl"), MARKS),
    Reader("data, jsonl.gz", jsonl_gz, reader("jsonl"), MARKS),
    Reader("data, jsonl.zst", zstd, reader("jsonl"), MARKS),
    Reader("data, txt.zst", zstd, reader("text"), MARKS),
    Reader("data, jsonl by a template", template, reader("jsonl", template="{text}{text}"), MARKS),
    Reader("data, parquet by a template", template, reader("parquet", template="{text}\n{text}"), MARKS),
    Reader("data, text", text, reader("text"), MARKS),
    Reader("data, arrow text", arrow, reader("arrow"), MARKS),
    Reader("data, arrow dictionaries", arrow, reader("arrow", template="{more}{text}"), MARKS),
    Reader("data, parquet", parquet, reader("parquet"), MARKS),
]
